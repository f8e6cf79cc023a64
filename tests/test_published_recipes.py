"""Recipes for published models: their computed first lines and judges, and what reads them: chart, pipeline, doctor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from clincot.cli.app import main
from clincot.config import Recipe, list_recipes, load_params, parse_config, render_params
from clincot.config.recipes import PolicyFacts
from clincot.config.sections import JudgeConfig
from clincot.models.load import unload_models
from clincot.pipelines.cluster_settings import load_cluster_settings
from clincot.pipelines.round import compile_round
from clincot.pipelines.round_plan import RoundPlan
from tests.chart.rendering import rendered, settings_of
from tests.recipe_headers import render_header
from tests.support.families import FAMILIES, has_torchvision

ROOT = Path(__file__).parents[1]
ALL_RECIPES = bool(os.environ.get("CLINCOT_ALL_RECIPES"))  # as `make recipes` sets it
RECIPES = [recipe for recipe in list_recipes() if recipe.policy is not None]
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def get_policy(recipe: Recipe) -> PolicyFacts:
    assert recipe.policy is not None
    return recipe.policy


# The first lines


@every_recipe
def test_gpus_memory_hours_and_published_rows_are_computed(recipe: Recipe) -> None:
    """They follow from the recipe; `python -m tests.recipe_headers --write` writes them."""
    assert render_header(recipe) in recipe.path.read_text(encoding="utf-8")


# Judges


@every_recipe
def test_judges_are_two_other_models(recipe: Recipe) -> None:
    paths = [spec.path for spec in recipe.params.judge.judges]
    assert len({*paths}) == recipe.params.judge.quorum == 2
    assert recipe.params.preflight.base not in paths


@every_recipe
def test_the_commented_judges_by_url_are_the_same_panel(recipe: Recipe) -> None:
    lines = recipe.path.read_text(encoding="utf-8").splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("# Judges by URL"))
    block = []
    for line in lines[start + 1 :]:
        if not line.startswith("#"):
            break
        block.append(line.removeprefix("#"))
    panel = parse_config(JudgeConfig, yaml.safe_load("\n".join(block)), where="block")
    assert [spec.name for spec in panel.judges] == [spec.name for spec in recipe.params.judge.judges]
    assert all(spec.url.endswith("/v1") for spec in panel.judges)


# Chart, pipeline, DVC


@every_recipe
def test_the_chart_renders_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    objects = rendered("default", "--set", f"pipeline.recipe={recipe.name}")
    path = tmp_path / "params.yaml"
    path.write_text(settings_of(objects)["params.yaml"])
    effective = load_params(path)
    assert effective.recipe.name == recipe.name
    assert effective.recipe.changed == ("publish.store", "publish.name")
    assert effective.train == recipe.params.train


@every_recipe
def test_the_pipelines_form_has_the_recipes_values(recipe: Recipe) -> None:
    """What `clincot pipeline compile` writes as defaults of a run; compiling takes 4 s, so `make recipes` does all."""
    arguments = RoundPlan(params=load_params(None, recipe=recipe.name)).arguments
    assert arguments["recipe"] == recipe.name
    assert arguments["base"] == recipe.params.preflight.base
    assert arguments["train"]["lr"] == recipe.params.train.lr
    assert arguments["answer"]["steps"] == list(recipe.params.answer.steps)


@pytest.mark.kfp
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [one.name for one in RECIPES] if ALL_RECIPES else ["llava-med-1.5-7b", "clincot-paper"]
)
def test_the_pipeline_compiles_with_the_recipe(name: str, tmp_path: Path) -> None:
    params = load_params(None, recipe=name)
    plan = RoundPlan(params=params, cluster=load_cluster_settings(ROOT / "pipelines" / "cluster.yaml"))
    compile_round(plan, tmp_path / "round.yaml")
    spec, _ = yaml.load_all((tmp_path / "round.yaml").read_text(), Loader=yaml.CSafeLoader)
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    assert inputs["recipe"]["defaultValue"] == name
    assert inputs["train"]["defaultValue"]["lr"] == params.train.lr


@every_recipe
def test_dvc_reads_the_recipe_from_params_yaml(recipe: Recipe, tmp_path: Path) -> None:
    """`clincot params --recipe NAME > params.yaml`; every `params:` entry of dvc.yaml is a section of it."""
    path = tmp_path / "params.yaml"
    path.write_text(render_params(load_params(None, recipe=recipe.name)))
    content = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    named = set[str]()
    for stage in stages:
        named |= {name.partition(".")[0] for name in stage.get("params", ())}
    assert named <= {*content}
    assert load_params(path).train == recipe.params.train


# The doctor


@every_recipe
def test_the_doctor_finds_a_policy_of_the_family_sound(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny checkpoint of the family; the memory of the real one is in the recipe's first lines."""
    family = next(family for family in FAMILIES if family.name == get_policy(recipe).family)
    if family.needs_torchvision and not has_torchvision():
        pytest.skip("its processor needs torchvision; `make recipes` has it")
    family.build(tmp_path / "checkpoint")
    code = main(["doctor", str(tmp_path / "checkpoint"), "--recipe", recipe.name, "--gpu-memory", "74.5"])
    table = capsys.readouterr().out
    unload_models()
    assert code == 0, table
    assert "**FAIL**" not in table
    assert "memory: training" in table
