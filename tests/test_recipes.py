"""Recipes: named, complete, read the same way everywhere; params.yaml is the chosen one's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from clincot.config import (
    SECTION_NAMES,
    FrozenConfig,
    Params,
    find_recipe,
    list_recipes,
    load_params,
    render_params,
)
from clincot.config.params_yaml import is_inherited
from clincot.config.recipes import Recipe
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord

ROOT = Path(__file__).parents[1]
RECIPES = list_recipes()
HEAD = "recipe: {name: mine, about: For a test.}\n"


def written(tmp_path: Path, text: str, name: str = "params.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def find_missing_fields(config: FrozenConfig, values: Mapping[str, Any], where: str) -> Iterator[str]:
    """Fields of a section that a recipe's file does not name, those of nested sections too.

    `clincot params` leaves out a field that is off and is not to change the digests of earlier versions.
    """
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if is_inherited(where, name) or (field.exclude_if is not None and field.exclude_if(value)):
            continue
        if name not in values:
            yield f"{where}.{name}"
        elif isinstance(value, FrozenConfig):
            yield from find_missing_fields(value, values[name], f"{where}.{name}")


def find_missing_of_recipe(recipe: Recipe) -> list[str]:
    missing = [name for name in SECTION_NAMES if name not in recipe.values]
    for name in SECTION_NAMES:
        missing += find_missing_fields(getattr(recipe.params, name), recipe.values.get(name, {}), name)
    return missing


def test_the_shipped_recipes() -> None:
    """One for the demo, five for published models, four for the settings of papers."""
    models = ["huatuogpt-vision-7b", "lingshu-7b", "llava-med-1.5-7b", "medgemma-4b", "qwen2.5-vl-7b"]
    papers = ["clincot-code", "clincot-paper", "mmedpo", "uv-cot"]
    assert [recipe.name for recipe in RECIPES] == sorted(["small-model", *models, *papers])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_shipped_recipe_is_complete_and_described(recipe: Recipe) -> None:
    assert recipe.path.stem == recipe.name
    assert len(recipe.about) > 20
    assert find_missing_of_recipe(recipe) == []
    assert recipe.path.read_text(encoding="utf-8").startswith("# ")


def test_an_incomplete_recipe_would_be_found(tmp_path: Path) -> None:
    text = (ROOT / "recipes" / "small-model.yaml").read_text()
    path = written(tmp_path, text.replace("  min_gap: 0.2", "  # min_gap: 0.2").replace("    open_f1: 0.13\n", ""))
    assert find_missing_of_recipe(find_recipe(path)) == ["pair.min_gap", "decide.floors.open_f1"]


def test_params_yaml_is_the_chosen_recipe() -> None:
    """Byte for byte what `clincot params --recipe small-model` prints."""
    assert (ROOT / "params.yaml").read_text(encoding="utf-8") == render_params(load_params(None, recipe="small-model"))


@pytest.mark.parametrize(
    "params",
    [
        Params(),
        load_params(None, recipe="small-model"),
        load_params(None, ("train.lr=1e-5", "decide.floors.open_f1=null"), recipe="small-model"),
        load_params(None, ("propose.grounders={random: 1}", "answer.steps=['{question}', 'Where: #1?']")),
    ],
    ids=["neutral", "recipe", "changed", "neutral, changed"],
)
def test_rendered_parameters_read_back_the_same(params: Params, tmp_path: Path) -> None:
    assert load_params(written(tmp_path, render_params(params))) == params


def test_params_yaml_of_a_recipe_file_needs_no_recipe(tmp_path: Path) -> None:
    """A recipe of one's own is not found by its name, so its digest is written and the values are taken as they are."""
    recipe = written(tmp_path, HEAD + "train: {lr: 0.5}", "mine.yaml")
    params = load_params(None, ("pair.pick=top",), recipe=str(recipe))
    rendered = written(tmp_path, render_params(params))
    recipe.unlink()
    assert load_params(rendered) == params
    later = load_params(rendered, ("train.beta=0.3",))
    assert (later.recipe.name, later.recipe.digest) == ("mine", params.recipe.digest)
    assert later.recipe.changed == ("pair.pick", "train.beta")


def test_later_sources_win(tmp_path: Path) -> None:
    """Neutral defaults < recipe < params file < --set, field by field."""
    path = written(tmp_path, "recipe: {name: small-model}\ntrain: {lr: 0.5, beta: 0.2}")
    params = load_params(path, ("train.beta=0.3",))
    assert params.train.warmup_ratio == Params().train.warmup_ratio  # neutral
    assert params.train.nll_weight == 2.0  # the recipe's
    assert params.train.lr == 0.5  # the file's
    assert params.train.beta == 0.3
    assert params.recipe.name == "small-model"
    assert params.recipe.changed == ("train.beta", "train.lr")
    assert params == load_params(written(tmp_path, "train: {lr: 0.5}"), ("train.beta=0.3",), recipe="small-model")


def test_grounders_and_lists_are_replaced_as_a_whole(tmp_path: Path) -> None:
    text = "propose: {grounders: {random: 1}}\nevaluate: {arms: [whole]}\ndecide: {floors: {open_f1: null}}"
    params = load_params(written(tmp_path, text), recipe="small-model")
    assert params.propose.grounders == {"random": 1}
    assert params.evaluate.arms == ("whole",)
    assert params.decide.floors.open_f1 is None
    assert params.decide.floors.hit_rate == 0.1


def test_the_benchmark_follows_an_override_of_the_grounders() -> None:
    """`propose` is an alias in evaluate.propose; an override of the benchmark's own leaves the round's as it is."""
    both = load_params(None, ("propose.temperature=0.5",), recipe="small-model")
    assert both.propose.temperature == both.evaluate.propose.temperature == 0.5
    one = load_params(None, ("evaluate.propose.temperature=0.5",), recipe="small-model")
    assert (one.propose.temperature, one.evaluate.propose.temperature) == (1.0, 0.5)


def test_without_a_recipe_the_defaults_are_neutral() -> None:
    params = load_params(None, ("train.lr=0.5",))
    assert params.describe_recipe() == {"name": "neutral", "digest": Params().digest, "changed": ["train.lr"]}


def test_a_recipes_digest_follows_its_values_only(tmp_path: Path) -> None:
    first = find_recipe(written(tmp_path, HEAD + "train: {lr: 0.5, beta: 0.2}", "a.yaml"))
    same = find_recipe(written(tmp_path, "# other words\n" + HEAD + "train: {beta: 0.2, lr: 5e-1}", "b.yaml"))
    other = find_recipe(written(tmp_path, HEAD + "train: {lr: 0.5, beta: 0.3}", "c.yaml"))
    assert first.digest == same.digest != other.digest


@pytest.mark.parametrize("name", ["smal-model", "", "../recipes/small-model", "__init__"])
def test_an_unknown_recipe_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        InvalidInput, match=r"no recipe is called .* the shipped recipes are: clincot-code, .*, small-model, uv-cot\."
    ):
        find_recipe(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: 0.5}", "not a recipe; expected `recipe: {name: …, about: …}`"),
        ("recipe: mine", "recipe: expected {name: …, about: …}, got 'mine'"),
        ("recipe: {name: mine}", "recipe: about: Field required"),
        ("recipe: {name: '', about: x}", "recipe: name: "),
        (HEAD + "trian: {lr: 0.5}", "unknown parameter trian; did you mean train?"),
        (HEAD + "train: {lt: 0.5}", "unknown parameter train.lt; did you mean train.lr?"),
    ],
)
def test_a_wrong_recipe_is_named_with_its_file(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text, "mine.yaml")
    with pytest.raises(InvalidRecord) as refused:
        load_params(None, recipe=str(path))
    assert str(path) in str(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "recipe", "overrides", "message"),
    [
        ("recipe: {name: other}", "", (), "no recipe is called 'other'"),
        ("recipe: {name: other}", "small-model", (), "is based on the recipe 'other', but --recipe asks for 'small-"),
        ("recipe: {nam: other}", "", (), "recipe: nam: Extra inputs"),
        ("recipe: other", "", (), "recipe: expected {name: …}, got 'other'"),
        ("", "", ("recipe.name=other",), "a recipe is chosen with --recipe"),
    ],
)
def test_a_wrong_reference_is_refused(
    text: str, recipe: str, overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput) as refused:
        load_params(written(tmp_path, text), overrides, recipe)
    assert message in str(refused.value)


def test_the_recipe_enters_no_digest() -> None:
    """Records hold digests of sections: they are the same whatever the recipe is called."""
    params = load_params(None, recipe="small-model")
    assert params.recipe.name
    assert params.digest == params.model_copy(update={"recipe": Params().recipe}).digest


def test_dvc_sees_the_values_of_the_sections() -> None:
    """`params: [train]` of dvc.yaml is plain YAML to DVC."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert content["train"]["nll_weight"] == 2.0
    assert list(content) == ["recipe", *SECTION_NAMES]
