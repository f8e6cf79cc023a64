"""Render the chart for hundreds of values in one process of Helm, which takes milliseconds for each.

A copy of the chart gets a template that includes all others once for every set of values. The templates are the real
ones: in Helm, a file of templates/ is a template with its path as its name, and one that begins with an underscore is
not rendered by itself. Values come as a file, as with `--values`, so numbers are floating-point numbers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.chart.rendering import CHART, SERVED, run

Json = dict[str, Any]
_DRIVER = """
{{- range $index, $values := .Files.Get "draws.json" | fromJsonArray }}
{{- $template := dict "Name" "clincot/templates/driver.yaml" "BasePath" $.Template.BasePath }}
{{- $root := dict "Values" $values "Release" $.Release "Chart" $.Chart "Capabilities" $.Capabilities "Files" $.Files }}
{{- $root = set $root "Template" $template }}
{{- $problems := include "clincot.problems" $root }}
{{- $texts := dict }}
{{- $notes := "" }}
{{- if not $problems }}
{{- range $name := list FILES }}
{{- $texts = set $texts $name (include (printf "clincot/templates/%s" $name) $root) }}
{{- end }}
{{- $notes = include "clincot.notes" $root }}
{{- end }}
{{- $draw := dict "apiVersion" "v1" "kind" "ConfigMap" "metadata" (dict "name" (printf "draw-%d" $index)) }}
---
{{ toJson (merge $draw (dict "draw" (dict "problems" $problems "texts" $texts "notes" $notes))) }}
{{- end }}
"""


class Rendering(NamedTuple):
    """What the chart says to one set of values: the contradictions that it finds, or else documents and notes."""

    problems: str
    documents: tuple[str, ...] = ()
    notes: str = ""


def render_batch(draws: Sequence[Json], version: str = "3") -> list[Rendering]:
    """Render the chart for each of the values, which have to be complete and valid. Raises RuntimeError.

    The error is that of a template, which is always a defect of the chart.
    """
    with tempfile.TemporaryDirectory() as folder:
        chart = _copy_chart(Path(folder), draws)
        apis = [f"--api-versions={api}" for api in SERVED]
        words = ("template", "clincot", str(chart), "--namespace", "clincot", "--set", "store.existingSecret=s3")
        done = run("helm", version, *words, *apis, seconds=600)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {one["metadata"]["name"]: one["draw"] for one in lines}
    return [_read_draw(found[f"draw-{index}"]) for index in range(len(draws))]


def _copy_chart(folder: Path, draws: Sequence[Json]) -> Path:
    chart = folder / "clincot"
    shutil.copytree(CHART, chart)
    (chart / "values.schema.json").unlink()  # the draws were validated before
    (chart / "draws.json").write_text(json.dumps(list(draws)))
    templates = chart / "templates"
    files = sorted(path.relative_to(templates) for path in templates.rglob("*.yaml") if "validation" not in path.parts)
    for path in templates.rglob("*.yaml"):
        path.rename(path.with_name(f"_{path.name}"))
    names = " ".join(json.dumps(str(path.with_name(f"_{path.name}"))) for path in files)
    (templates / "driver.yaml").write_text(_DRIVER.replace("FILES", names))
    (templates / "NOTES.txt").unlink()
    return chart


def _read_draw(draw: Json) -> Rendering:
    parts = [part.strip() for text in draw["texts"].values() for part in f"\n{text}".split("\n---")]
    return Rendering(draw["problems"], tuple(part for part in parts if part), draw["notes"])
