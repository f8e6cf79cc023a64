"""manifests/ is up to date, and kustomize builds the objects that Helm renders."""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml

from tests.chart import manifests
from tests.chart.manifests import OVERLAYS, base, key_of, overlay
from tests.chart.rendering import HELMS, MANIFESTS, Json, run
from tests.support.crds import KINDS


def kustomized(folder: str, kubectl: str) -> list[Json]:
    done = run("kubectl", kubectl, "kustomize", str(MANIFESTS / folder))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return [one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one]


def test_committed_manifests_are_up_to_date() -> None:
    run("helm", "3", "version")  # skips the test if there is no Helm
    expected = manifests.files()
    found = {path.relative_to(MANIFESTS) for path in MANIFESTS.rglob("*.yaml")}
    handwritten = {"values.yaml", "base/namespace.yaml"}
    assert {str(path) for path in found} - handwritten == {str(path) for path in expected}
    for path, content in expected.items():
        assert (MANIFESTS / path).read_text(encoding="utf-8") == content, "python -m tests.chart.manifests --write"


@pytest.mark.parametrize("kubectl", HELMS)
@pytest.mark.parametrize("name", ["", *OVERLAYS])
def test_kustomize_builds_the_objects_that_helm_renders(name: str, kubectl: str) -> None:
    run("helm", "3", "version")
    expected = sorted([*(overlay(name) if name else base()), _namespace()], key=key_of)
    found = sorted(kustomized(f"overlays/{name}" if name else "base", kubectl), key=key_of)
    assert [key_of(one) for one in found] == [key_of(one) for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == theirs, key_of(ours)


def _namespace() -> Json:
    content: Json = yaml.safe_load((MANIFESTS / "base" / "namespace.yaml").read_text())
    return content


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_valid(name: str) -> None:
    for one in kustomized(f"overlays/{name}", "4"):
        if one["kind"] not in KINDS:
            kubernetes_validate.validate(one, "1.37", strict=True)


def test_kind_needs_no_gpu_and_profile_runs_in_its_namespace() -> None:
    """The overlay kind requests no GPU; the overlay profile has its runner in team-a."""
    assert "nvidia.com/gpu" not in yaml.safe_dump_all(kustomized("overlays/kind", "4"))
    objects = kustomized("overlays/profile", "4")
    runner = next(one for one in objects if key_of(one)[0::2] == ("ServiceAccount", "clincot-runner"))
    assert runner["metadata"]["namespace"] == "team-a"
    assert "kubeflow" not in {one["metadata"].get("namespace") for one in objects}
