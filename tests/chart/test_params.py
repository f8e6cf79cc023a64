"""A pod's params.yaml is the recipe overridden by pipeline.params."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from clincot.config import Params, find_recipe, list_recipes, load_params
from tests.chart.rendering import CHART, HELMS, PROFILES, ROOT, Json, rendered, settings_of, template

# Values that Helm's own merge functions handle wrongly: false, 0, "" and a map that must be replaced.
TRICKY: Json = {
    "train": {"freeze_vision": False, "nll_weight": 0, "lr": 1e-5},
    "propose": {"grounders": {"random": 1}},
    "evaluate": {"propose": {"grounders": {"windows": 3}, "temperature": 0}},
    "judge": {"calibration_file": "", "judges": [{"name": "x", "path": "shipped:judge-a"}], "quorum": 1},
    "preflight": {"cluster": "no", "free_gb": 0},
    "answer": {"steps": ["{question}", "Why?"]},
    "publish": {"name": "other"},
}


def load_effective(objects: tuple[Json, ...], tmp_path: Path) -> Params:
    """Return the parameters that a pod reads from its params.yaml."""
    path = tmp_path / "rendered.yaml"
    path.write_text(settings_of(objects)["params.yaml"])
    return load_params(path)


def load_expected(values: dict[str, Any], tmp_path: Path, recipe: str, **derived: Json) -> Params:
    """Return what load_params makes of pipeline.params, over the recipe.

    Includes what the chart derives from other values.
    """
    path = tmp_path / "values.yaml"
    derived.setdefault("publish", {"store": "s3://clincot/platform", "name": "clincot"})
    for section, fields in derived.items():
        values = {**values, section: {**fields, **values.get(section, {})}}
    path.write_text(yaml.safe_dump(values))
    return load_params(path, recipe=recipe)


def read_pipeline(profile: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CHART / f"values-{profile}.yaml").read_text())
    return content["pipeline"]  # type: ignore[no-any-return]


def test_the_chart_has_copies_of_the_projects_recipes() -> None:
    """Helm reads no file outside the chart, so the chart needs copies."""
    copies = {path.name: path.read_bytes() for path in (CHART / "recipes").iterdir()}
    assert copies == {path.name: path.read_bytes() for path in (ROOT / "recipes").glob("*.yaml")}


@pytest.mark.parametrize("profile", ["trial", "cpu"])
@pytest.mark.parametrize("version", HELMS)
def test_profiles_of_small_models_use_their_recipe(profile: str, version: str, tmp_path: Path) -> None:
    pipeline = read_pipeline(profile)
    assert pipeline["recipe"] == "small-model"
    effective = load_effective(rendered(profile, version=version), tmp_path)
    base = {"preflight": {"base": "assets/policy"}}
    assert effective == load_expected(pipeline["params"], tmp_path, "small-model", **base)
    assert effective.train == find_recipe("small-model").params.train
    assert effective.recipe.name == "small-model"
    assert effective.recipe.changed == (
        "preflight.base",
        "publish.store",
        "publish.golden",
    )


@pytest.mark.parametrize("version", HELMS)
def test_production_overrides_neutral_defaults(version: str, tmp_path: Path) -> None:
    pipeline = read_pipeline("production")
    assert "recipe" not in pipeline
    effective = load_effective(rendered("production", version=version), tmp_path)
    data = {"repository": "https://git.hospital.example/imaging/preferences.git", "branch": "main"}
    judges = {"judges": [spec.model_dump(mode="json") for spec in effective.judge.judges]}
    assert effective == load_expected(pipeline.get("params", {}), tmp_path, "", version=data, judge=judges)
    assert len(effective.judge.judges) == 3
    assert effective.train == Params().train


@pytest.mark.parametrize("recipe", ["", "small-model"])
@pytest.mark.parametrize("version", HELMS)
def test_values_override_a_recipe_as_in_load_params(recipe: str, version: str, tmp_path: Path) -> None:
    flags = ("--set", f"pipeline.recipe={recipe}", "--set-json", f"pipeline.params={json.dumps(TRICKY)}")
    effective = load_effective(rendered("default", *flags, version=version), tmp_path)
    assert effective == load_expected(TRICKY, tmp_path, recipe)
    assert effective.train.nll_weight == 0
    assert effective.preflight.cluster == "no"
    assert effective.propose.grounders == {"random": 1}


@pytest.mark.parametrize("profile", PROFILES)
def test_without_a_recipe_a_profile_has_neutral_defaults(profile: str, tmp_path: Path) -> None:
    effective = load_effective(rendered(profile, "--set", "pipeline.recipe="), tmp_path)
    assert effective.train == Params().train
    assert effective.recipe.name == ""


def test_an_unknown_recipe_is_refused() -> None:
    """The message lists the known ones."""
    done = template("--set", "store.existingSecret=s3", "--set", "pipeline.recipe=large-model")
    assert done.returncode != 0
    names = ", ".join(recipe.name for recipe in list_recipes())
    assert f'pipeline.recipe: no recipe is called "large-model"; the chart has: {names}' in done.stderr
