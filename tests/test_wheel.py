"""The wheel holds every package with its data and works without a repository; the checkout imports the same."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {  # folder of the checkout -> folder in the wheel
    "src/clincot": "clincot",
    "pipelines": "clincot/pipelines",
    "components": "clincot/components",
    "assets": "clincot/assets",
    "recipes": "clincot/recipes",
}
DATA_SUFFIXES = {".html", ".css", ".js", ".yaml", ".jsonl", ".json", ".png", ".safetensors", ".jinja", ".typed"}


def list_source_files() -> dict[str, Path]:
    """What must be in the wheel: {name in the wheel: file}. Read from the tree, so that a new file cannot be missed."""
    files = {}
    for source, target in SOURCES.items():
        for path in (ROOT / source).rglob("*"):
            is_wanted = path.suffix == ".py" or path.suffix in DATA_SUFFIXES or path.name == "py.typed"
            if is_wanted and path.is_file() and "__pycache__" not in path.parts:
                files[f"{target}/{path.relative_to(ROOT / source).as_posix()}"] = path
    return files


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from links to the tree, so that the build leaves nothing in it; no network is needed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    (source / "src").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", *SOURCES):
        (source / name).symlink_to(ROOT / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(source), cwd=folder)
    (built,) = folder.glob("clincot-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=target)
    return target


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working folder without a params.yaml."""
    return tmp_path


def run_installed(installed: Path, elsewhere: Path, *arguments: str) -> str:
    return run(sys.executable, *arguments, cwd=elsewhere, PYTHONPATH=str(installed))


def test_the_wheel_holds_the_whole_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        expected = list_source_files()
        assert names == {*expected}
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes(), name


def test_the_tree_has_what_is_looked_for() -> None:
    """So that the comparison above is about something."""
    assert {
        "clincot/py.typed",
        "clincot/reporting/page.html",
        "clincot/reporting/static/question_browser.js",
        "clincot/pipelines/cluster.yaml",
        "clincot/pipelines/compiled/round.yaml",
        "clincot/components/train/component.py",
        "clincot/recipes/small-model.yaml",
        "clincot/assets/policy/model.safetensors",
        "clincot/assets/golden/images/000000.png",
        "clincot/assets/calibration.jsonl",
        "clincot/config/sections.py",
        "clincot/demo/__main__.py",
    } <= {*list_source_files()}


def test_every_package_of_the_tree_is_listed() -> None:
    packages = {name.rpartition("/")[0].replace("/", ".") for name in list_source_files() if name.endswith(".py")}
    assert packages == {*PYPROJECT["tool"]["setuptools"]["packages"]}


def test_the_command_runs_elsewhere(installed: Path, elsewhere: Path) -> None:
    version = PYPROJECT["project"]["version"]
    assert run_installed(installed, elsewhere, "-m", "clincot", "--version") == f"clincot {version}\n"
    assert "--short" in run_installed(installed, elsewhere, "-m", "clincot.demo", "--help")


def test_models_and_recipes_are_found_elsewhere(installed: Path, elsewhere: Path) -> None:
    """The same bytes as the checkout's, so digests of judges and policies are the same too."""
    code = """
import clincot
from clincot.config import list_recipes, load_params, render_params, resolve_path
from clincot.models.checkpoint import hash_checkpoint
print(clincot.__file__)
print(*(recipe.name for recipe in list_recipes()))
print(resolve_path("shipped:judge-b"))
print(*(hash_checkpoint(resolve_path(f"shipped:{name}")) for name in ("policy", "judge-a", "judge-b")))
print(render_params(load_params(None, recipe="small-model")))
"""
    module, recipes, judge, digests, *rendered = run_installed(installed, elsewhere, "-c", code).splitlines()
    assert module == str(installed / "clincot" / "__init__.py")
    assert recipes.split() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert judge == str(installed / "clincot" / "assets" / "judge-b")
    from clincot.models.checkpoint import hash_checkpoint

    assert digests.split() == [hash_checkpoint(ROOT / "assets" / name) for name in ("policy", "judge-a", "judge-b")]
    assert yaml.safe_load("\n".join(rendered)) == yaml.safe_load((ROOT / "params.yaml").read_text())


OUTSIDE_SRC = ("clincot.pipelines.round", "clincot.components.train.component")


def test_pipelines_and_components_import_elsewhere(installed: Path, elsewhere: Path) -> None:
    code = f"import {', '.join(OUTSIDE_SRC)}; print(clincot.pipelines.round.__file__)"
    assert run_installed(installed, elsewhere, "-c", code).strip() == str(installed / "clincot/pipelines/round.py")


@pytest.mark.parametrize("module", OUTSIDE_SRC)
def test_the_checkout_imports_both(module: str) -> None:
    assert Path(str(importlib.import_module(module).__file__)).is_relative_to(ROOT)
