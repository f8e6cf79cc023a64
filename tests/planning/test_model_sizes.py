"""Sizes of the published checkpoints from their configs, against what is published of them and what recipes say."""

from __future__ import annotations

import pytest

from clincot.config import Recipe, list_recipes
from clincot.planning.model_sizes import ModelSize, measure_model
from clincot.planning.published_models import PublishedModel, find_published_model, list_published_models

RECIPES = [recipe for recipe in list_recipes() if recipe.policy is not None]


def measure(name: str) -> ModelSize:
    return measure_model(list_published_models()[name].build_config())


def test_weights_are_those_of_the_published_files() -> None:
    """2 bytes a weight: google/medgemma-4b-it has safetensors of 8,600,277,880 bytes, headers included.

    Those of Qwen/Qwen2.5-VL-7B-Instruct are 16,584,414,544 bytes; the headers of both are below .01 %.
    """
    assert measure("medgemma-4b").total * 2 == pytest.approx(8_600_277_880, rel=1e-4)
    assert measure("qwen2.5-vl-7b").total * 2 == pytest.approx(16_584_414_544, rel=1e-4)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipes_state_the_sizes_of_their_policy(recipe: Recipe) -> None:
    """image_tokens are of a film of 1024 x 1024 pixels, crop_tokens of a crop of 512 x 512."""
    assert recipe.policy is not None
    published = find_published_model(recipe.params.preflight.base)
    assert published is not None
    assert published.title == recipe.policy.title
    assert measure_model(published.build_config()).total == recipe.policy.parameters
    tokens = [published.count_picture_tokens(side, side) for side in (1024, 512)]
    assert tokens == [recipe.policy.image_tokens, recipe.policy.crop_tokens]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_judges_of_every_recipe_are_known(recipe: Recipe) -> None:
    for spec in recipe.params.judge.judges:
        assert find_published_model(spec.path) is not None, spec.path


def test_a_token_is_multiplied_by_the_layers_alone() -> None:
    """Mistral 7B: 32 layers of q, o (4096 x 4096), k, v (4096 x 1024), three of 4096 x 14336, and two norms."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert measure("llava-med-1.5-7b").body == 32 * layer + 4096  # and the last norm


def test_a_tied_head_is_counted_once() -> None:
    size = measure("medgemma-4b")
    assert size.tied_head
    assert size.embeddings == size.head == 262208 * 2560
    assert size.body == size.language - size.embeddings
    assert not measure("qwen2.5-vl-7b").tied_head


def test_patches_of_an_image_token() -> None:
    """Qwen merges 2 x 2 patches, Gemma's 64 x 64 patches are 256 tokens, LLaVA's are tokens themselves."""
    names = ("qwen2.5-vl-7b", "medgemma-4b", "llava-1.5-7b")
    assert [measure(name).patches_per_token for name in names] == [4, 16, 1]


def test_a_model_is_found_by_folder_repository_or_title() -> None:
    by = (("models/medgemma-4b", ""), ("google/medgemma-4b-it", ""), ("", "MedGemma 4B"))
    found: list[PublishedModel | None] = [find_published_model(checkpoint, title) for checkpoint, title in by]
    assert all(model is not None and model.title == "MedGemma 4B" for model in found)
    assert find_published_model("models/other") is None
