"""The scripts for images: their shell code, and what they print at first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.image.test_dockerfile import ROOT, tool

sys.path.insert(0, str(ROOT / "scripts"))

from pip_for_build import flags, folders, pip_settings

SCRIPTS = sorted(
    path for folder in ("scripts", "scripts/image", "tests/image") for path in (ROOT / folder).glob("*.sh")
)


def test_shellcheck_finds_no_error() -> None:
    assert len(SCRIPTS) >= 6
    done = subprocess.run([tool("shellcheck"), ROOT / ".ci" / "run", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)


def run_script(name: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "scripts" / name], env=env, capture_output=True, text=True, timeout=60)


def test_the_image_test_needs_consent() -> None:
    done = run_script("test-image.sh", PATH=os.environ["PATH"])
    assert done.returncode == 1
    assert "buildah podman runc debootstrap" in done.stdout
    assert "root" in done.stdout
    assert "nothing was done; set CONFIRM=yes to continue" in done.stderr


def test_the_cluster_test_names_missing_tools(tmp_path: Path) -> None:
    """This machine has git, but none of the other tools."""
    for name in ("bash", "dirname", "sed", "git"):
        found = next(Path(folder) / name for folder in ("/usr/bin", "/bin") if (Path(folder) / name).exists())
        (tmp_path / name).symlink_to(found)
    (tmp_path / "env").symlink_to("/usr/bin/env")
    done = run_script("e2e-kind.sh", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "missing: docker kind kubectl helm curl" in done.stderr


def test_pip_without_settings_needs_no_flags(tmp_path: Path) -> None:
    assert flags(pip_settings("global.timeout='60'\n"), tmp_path) == []
    assert not (tmp_path / "pip.conf").exists()


def test_a_private_index_is_passed_to_the_build(tmp_path: Path) -> None:
    """Local folders are mounted, and the certificate is a secret.

    The environment overrides files.
    """
    wheels, index = tmp_path / "wheels", tmp_path / "mirror" / "simple"
    wheels.mkdir()
    index.mkdir(parents=True)
    (wheels / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    settings = pip_settings(
        f":env:.find-links='{wheels}'\nglobal.cert='/etc/ca.pem'\nglobal.find-links='/nowhere'\n"
        f"global.extra-index-url='file://{index}\\nhttps://pypi.hospital.example/simple'\n"
    )
    assert settings["find-links"] == str(wheels)
    assert folders(settings) == [tmp_path / "mirror", wheels]
    assert flags(settings, tmp_path) == [
        *("--volume", f"{tmp_path}/mirror:{tmp_path}/mirror:ro", "--volume", f"{wheels}:{wheels}:ro"),
        *("--build-arg", "TORCH_INDEX=", "--secret", "id=pip_cert,src=/etc/ca.pem"),
        *("--secret", f"id=pip_conf,src={tmp_path}/pip.conf"),
    ]
    assert (tmp_path / "pip.conf").read_text().splitlines() == [
        "[global]",
        f"find-links = {wheels}",
        f"extra-index-url = file://{index}",
        "    https://pypi.hospital.example/simple",
        "cert = /run/secrets/pip_cert",
    ]


@pytest.mark.parametrize("workflow", ["ci.yaml", "e2e.yaml"])
def test_workflows_have_least_rights_and_run_local_commands(workflow: str) -> None:
    """Third-party actions are pinned by commit, because a tag can be moved."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())
    assert jobs["permissions"] == {"contents": "read"}
    steps = [step for job in jobs["jobs"].values() for step in job["steps"]]
    assert any(step.get("run") in (".ci/run", "make e2e-kind") for step in steps)
    for action in (step["uses"] for step in steps if "uses" in step):
        assert len(action.partition("@")[2]) == 40, action
