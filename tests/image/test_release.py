"""The release workflow's own steps run here; what needs a registry is checked as text."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.binaries import binary
from tests.chart.rendering import run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from release_dry_run import STEPS, Step, describe_steps, name_step  # noqa: E402

SCRIPT = ROOT / "scripts" / "release.sh"
WORKFLOWS = ROOT / ".github" / "workflows"
DIGESTS = {"cpu": "sha256:" + "1" * 64, "serve": "sha256:" + "2" * 64, "cuda": "sha256:" + "3" * 64}


def release(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    found = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(
        [str(cwd / "scripts" / "release.sh"), *words], cwd=cwd, env=found, capture_output=True, text=True, check=False
    )


def read_workflow(name: str) -> Any:
    return yaml.safe_load((WORKFLOWS / name).read_text())


def list_steps(workflow: Any) -> list[Any]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_dry_run_knows_every_step_of_the_workflow() -> None:
    """In the workflow's order, each with a command or a reason."""
    jobs = read_workflow("release.yaml")["jobs"]
    of_the_workflow = [(job, name_step(step)) for job, content in jobs.items() for step in content["steps"]]
    assert [(step.job, step.title) for step in STEPS] == of_the_workflow
    assert [step.title for step in STEPS if not (step.commands or step.reason)] == []


def test_the_dry_run_runs_what_the_workflow_runs_of_the_script() -> None:
    """The same commands, step by step; only the arguments differ."""
    jobs = read_workflow("release.yaml")["jobs"]
    steps = [step for content in jobs.values() for step in content["steps"]]
    for step, of_the_workflow in zip(STEPS, steps, strict=True):
        there = re.findall(r"scripts/release\.sh ([\w-]+)", of_the_workflow.get("run", ""))
        assert [words[1] for words in step.commands if words[0] == "scripts/release.sh"] == there, step.title
    targets = release("targets").stdout.split()
    assert jobs["image"]["strategy"]["matrix"]["target"] == targets
    assert set(targets) == set(DIGESTS)


def test_the_dry_run_says_what_became_of_each_step() -> None:
    steps = [
        Step("a", "one", (("true",),)),
        Step("a", "two", (("true",),), "no disk"),
        Step("b", "three", (), "no tag"),
    ]
    results: list[tuple[Step, bool | None]] = [(steps[0], False), (steps[1], True), (steps[2], None)]
    assert describe_steps(results).splitlines() == [
        "FAILED    a      one",
        "in part   a      two: no disk",
        "not here  b      three: no tag",
    ]


@pytest.mark.slow
def test_the_wheel_is_built_from_tracked_files_and_runs(tmp_path: Path) -> None:
    """What an earlier build has left in the tree is not packed."""
    stale = ROOT / "build" / "lib" / "clincot" / "stale_module.py"
    existed = stale.parents[2].exists()
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    try:
        done = release("wheel", str(tmp_path))
    finally:
        stale.unlink()
        if not existed:
            shutil.rmtree(stale.parents[2])
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert done.stdout == f"wheel: {wheel}\n"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "clincot/cli/app.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "clincot/stale_module.py" not in names


@pytest.mark.parametrize("helm", ["3", "4"])
def test_the_packaged_chart_names_images_by_digest(helm: str, tmp_path: Path) -> None:
    run("helm", helm, "version")  # skips the test if there is no Helm
    given = [f"{name}={digest}" for name, digest in DIGESTS.items()]
    done = release("chart", str(tmp_path), "ghcr.io/acme", *given, HELM=str(binary("helm", helm)))
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^try-chart: v{helm}\.\S+, 4 profiles$", done.stdout, re.MULTILINE)  # linted and rendered
    (package,) = tmp_path.glob("clincot-*.tgz")
    with tarfile.open(package) as archive:
        member = archive.extractfile("clincot/values.yaml")
        assert member is not None
        images = yaml.safe_load(member.read())["image"]
    for name, digest in DIGESTS.items():
        assert images[name] == {"repository": f"ghcr.io/acme/clincot-{name}", "tag": "", "digest": digest}


def test_a_digest_has_64_digits(tmp_path: Path) -> None:
    done = release("chart", str(tmp_path), "ghcr.io/acme", "cpu=sha256:12", HELM="false")
    assert done.returncode == 1
    assert "cpu: expected sha256: and 64 hexadecimal digits, got sha256:12" in done.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("charts/clincot/Chart.yaml", "version: 0.1.0", "version: 0.2.0", "Chart.yaml has the version 0.2.0"),
        ("Dockerfile", "ARG VERSION=0.1.0", "ARG VERSION=0.0.9", "ARG VERSION=0.0.9"),
        ("Dockerfile", "FROM base AS cuda\n", "FROM base AS gpu\n", "the Dockerfile has no target cuda"),
    ],
)
def test_versions_that_disagree_stop_a_release(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "Dockerfile", "CHANGELOG.md", "charts/clincot/Chart.yaml", "scripts/release.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert release("check", cwd=tmp_path).stdout == "check: 0.1.0\n"
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    done = release("check", cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_tag_is_that_of_the_version_and_has_notes() -> None:
    assert "the tag is v9.9, but pyproject.toml has the version" in release("check", "v9.9").stderr
    assert "CHANGELOG.md has no section 0.1.0" in release("check", "v0.1.0").stderr  # still under Unreleased


def test_everything_that_is_released_is_signed() -> None:
    """Wheel, images and chart, by the identity of the workflow; images have SBOM and provenance."""
    jobs = read_workflow("release.yaml")["jobs"]
    for name, job in jobs.items():
        assert job["permissions"]["id-token"] == "write", name
        assert any("cosign sign" in step.get("run", "") for step in job["steps"]), name
    (build,) = [step["run"] for step in jobs["image"]["steps"] if "buildx build" in step.get("run", "")]
    assert "--provenance mode=max --sbom true" in build
    assert 'BASE_IMAGE=$base@$digest"' in build  # the base by digest
    names = [step.get("uses", "").partition("@")[0] for step in jobs["image"]["steps"]]
    assert "aquasecurity/trivy-action" in names


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.yaml")), ids=lambda path: path.name)
def test_workflows_pin_actions_and_ask_for_little(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for step in list_steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
        assert "${{" not in step.get("run", ""), "expressions reach scripts through env only"


def test_the_project_has_the_files_of_a_public_one() -> None:
    for name in ("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "OWNERS", "CITATION.cff"):
        assert (ROOT / name).read_text().strip(), name


def test_dependabot_watches_packages_actions_and_images() -> None:
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {one["package-ecosystem"] for one in updates} == {"pip", "github-actions", "docker"}
