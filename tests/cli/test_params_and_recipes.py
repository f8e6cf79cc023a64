"""Parameters come from defaults, recipe, file and --set, and can be printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from clincot.cli.app import main
from clincot.config import Params, list_recipes, load_params
from tests.support import tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a data set, a params.yaml and a recipe."""
    monkeypatch.chdir(tmp_path)
    tiny.write_set(tmp_path / "data", key=False)
    (tmp_path / "params.yaml").write_text("prepare: {rounds: 1, limit: 2}")
    (tmp_path / "recipe.yaml").write_text("recipe: {name: mine, about: for this test}\nprepare: {rounds: 1, limit: 3}")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        ([], 2),
        (["--recipe", "recipe.yaml"], 3),
        (["-r", "recipe.yaml"], 3),
        (["-r", "recipe.yaml", "--params", "params.yaml"], 2),
        (["-r", "recipe.yaml", "--set", "prepare.limit=4"], 4),
        (["-r", "recipe.yaml", "--params", "params.yaml", "--set", "prepare.limit=4"], 4),
    ],
)
def test_a_recipe_comes_before_the_file_and_the_overrides(
    words: list[str], limit: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--data", "data", "--questions", "q.jsonl", *words]) == 0
    assert json.loads(capsys.readouterr().out) == {"questions": limit}


def test_an_unknown_recipe_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--data", "data", "--questions", "q.jsonl", "--recipe", "nowhere"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("clincot prepare: ")
    assert "nowhere" in error
    assert not (folder / "q.jsonl").exists()


def test_params_prints_what_would_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output is a parameter file with the same meaning."""
    assert main(["params", "-r", "recipe.yaml", "--set", "train.lr=1e-6"]) == 0
    (folder / "printed.yaml").write_text(capsys.readouterr().out)
    expected = load_params(None, ("train.lr=1e-6",), "recipe.yaml")
    assert (expected.prepare.limit, expected.train.lr) == (3, 1e-6)
    assert load_params(folder / "printed.yaml") == expected
    assert set(yaml.safe_load((folder / "printed.yaml").read_text())) <= set(Params.model_fields)


@pytest.mark.parametrize("words", [[], ["-r", "small-model"]])
def test_printed_parameters_are_no_recipe(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", *words]) == 0
    (folder / "printed.yaml").write_text(capsys.readouterr().out)
    assert main(["params", "--recipe", "printed.yaml"]) == 1
    assert "printed.yaml: this is a parameters file; use --params" in capsys.readouterr().err


def test_params_names_a_wrong_parameter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--set", "prepare.limits=1"]) == 1
    assert "prepare.limits" in capsys.readouterr().err


def test_recipes_are_listed_with_their_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    for recipe in list_recipes():
        assert f"{recipe.name} " in text
        assert " ".join(recipe.about.split()) in " ".join(text.split())


def test_recipes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in list_recipes():
        assert main(["recipes", "show", recipe.name]) == 0
        text = capsys.readouterr().out
        assert recipe.digest[:12] in text
        assert recipe.path.read_text(encoding="utf-8").strip() in text


def test_a_recipe_file_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "recipe.yaml"]) == 0
    assert capsys.readouterr().out.endswith((folder / "recipe.yaml").read_text() + "\n")


def test_an_unknown_recipe_cannot_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith(
        "clincot recipes: no recipe is called 'nowhere'; the shipped recipes are: "
    )


def test_demo_takes_its_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--run", "run", "--short", "--vqa-rad", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("clincot demo: nowhere: no such folder")
