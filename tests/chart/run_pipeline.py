"""Compile the pipeline that the chart's hook uploads, with the arguments of the hook's container."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml

from clincot.cli.app import main
from tests.chart.rendering import Json, of_kind, rendered, settings_of

OF_THE_UPLOAD = ("--line", "--installation", "--pipeline", "--experiment", "--namespace")


def compile_pipeline(objects: Sequence[Json], folder: Path) -> tuple[Json, Json]:
    """Return the pipeline and its settings for Kubernetes; the files of the ConfigMap are put into folder/settings."""
    settings = folder / "settings"
    settings.mkdir()
    for name, content in settings_of(objects).items():
        (settings / name).write_text(content)
    (job,) = of_kind(objects, "Job", "clincot-pipeline")
    words = job["spec"]["template"]["spec"]["initContainers"][0]["args"][2:]
    kept = [word for word in words if word.partition("=")[0] not in OF_THE_UPLOAD]
    arguments = [word.replace("/etc/clincot/settings", str(settings)) for word in kept]
    out = folder / "round.yaml"
    assert main(["pipeline", "compile", *arguments, "--out", str(out)]) == 0
    spec, platform = yaml.load_all(out.read_text(), Loader=yaml.CSafeLoader)
    return spec, platform


@cache
def compile_run(profile: str) -> Json:
    """Return the pipeline of a profile. The result is cached, so do not change it."""
    with tempfile.TemporaryDirectory() as folder:
        return compile_pipeline(rendered(profile), Path(folder))[0]
