"""The files of a run name the recipe, the hash of its values and what was changed; no record of its content does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clincot.config import Params, find_recipe, load_params
from clincot.reporting.page import write_page
from clincot.rounds import Plan, start_run
from clincot.runs.layout import read_results, read_run
from tests.support.runs import write_films, write_run


def plan_with(run: Path, params: Params) -> Plan:
    return Plan(run, run, run, run, params, 1)


def test_a_started_run_names_its_recipe(tmp_path: Path) -> None:
    params = load_params(None, ("train.lr=0.5", "prepare.rounds=2"), recipe="small-model")
    start_run(plan_with(tmp_path, params))
    recipe = read_run(tmp_path).recipe
    assert recipe is not None
    assert (recipe.name, recipe.digest) == ("small-model", find_recipe("small-model").digest)
    assert recipe.describe() == "small-model, changed: prepare.rounds, train.lr"
    assert load_params(tmp_path / "params.yaml") == params  # so do the page and every later reader


def test_a_run_resumes_with_another_recipe_of_the_same_judges(tmp_path: Path) -> None:
    """The stages see what changed by themselves; only what a run cannot change is compared."""
    start_run(plan_with(tmp_path, Params()))
    start_run(plan_with(tmp_path, load_params(None, ("train.lr=0.5",))))
    recipe = read_run(tmp_path).recipe
    assert recipe is not None
    assert recipe.describe() == "neutral, changed: train.lr"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("provenance")
    for name, films, seed in (("data", 12, 0), ("benchmark", 8, 1)):
        write_films(folder / name, films=films, seed=seed, split=name)
    write_run(folder / "run", folder / "data", folder / "benchmark", rounds=1)
    return folder / "run"


def test_results_and_page_name_the_recipe(run: Path) -> None:
    recipe = read_results(run).recipe
    assert recipe is not None
    assert (recipe.name, recipe.digest) == ("neutral", Params().digest)
    write_page(run, run / "page.html", title="a run")
    page = (run / "page.html").read_text()
    assert recipe.digest in page
    assert "neutral, changed: " in page


def test_a_run_of_an_earlier_version_is_read(run: Path) -> None:
    content = json.loads((run / "run.json").read_text())
    del content["recipe"]
    (run / "run.json").write_text(json.dumps(content))
    assert read_run(run).recipe is None
    write_page(run, run / "page.html", title="a run")


def test_no_record_of_content_names_the_recipe(run: Path) -> None:
    """Ids are hashes of content: a recipe's name must not change them."""
    for path in run.rglob("*.json*"):
        if path.name not in {"run.json", "results.json"}:
            assert "recipe" not in path.read_text(), path
