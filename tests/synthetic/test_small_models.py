"""The recipe of the shipped small models, on a recipe of a few images."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.learning_results import JUDGE_WARPS
from clincot.demo.walkthrough import BENCHMARK_WARPS, DATA_WARPS
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import Turn
from clincot.synthetic.small_models import (
    CALIBRATION_WARPS,
    EVALUATION_WARPS,
    RECIPES,
    ModelRecipe,
    export_half_precision,
    make_small_model,
)
from clincot.synthetic.tiny_model import TinyModelSpec
from tests.support.tiny import write_model

pytestmark = pytest.mark.slow

SPEC = TinyModelSpec(seed=4, vision_hidden=32, vision_layers=1, text_hidden=32, text_layers=1, vocabulary=512)


def test_no_patient_serves_two_purposes() -> None:
    """A patient is a warp of the CT: lessons, rounds, benchmark, calibration and the judges' test have their own."""
    purposes = [recipe.warps for recipe in RECIPES]
    evaluation = [DATA_WARPS, BENCHMARK_WARPS, JUDGE_WARPS, CALIBRATION_WARPS]
    for one, other in combinations([*purposes, *evaluation], 2):
        assert not set(one) & set(other)
    assert all(set(warps) <= set(EVALUATION_WARPS) for warps in evaluation)
    assert not any(set(warps) & set(EVALUATION_WARPS) for warps in purposes)


def test_the_judges_differ_from_the_policy_and_from_each_other() -> None:
    assert [recipe.role for recipe in RECIPES] == ["policy", "judge", "judge"]
    specs = [recipe.spec for recipe in RECIPES]
    assert len({spec.seed for spec in specs}) == 3
    assert len({spec.model_copy(update={"seed": 0}) for spec in specs}) == 3  # in size too


def test_a_recipe_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    """Two parts of a judge's lessons: with the second part gone, the first is kept and the second comes out again."""
    recipe = ModelRecipe(
        "judge", "judge", SPEC, range(1000, 1002), dense_images=16, lesson_images=12, lessons=((1, 1), (2, 1))
    )
    work, out = tmp_path / "work", tmp_path / "out"
    make_small_model(recipe, work, out)
    first = (work / "judge-1" / "model.safetensors").stat().st_mtime_ns
    made = (out / "judge" / "model.safetensors").read_bytes()
    for gone in (work / "judge-2", out / "judge"):
        gone.rename(tmp_path / f"{gone.parent.name}-{gone.name}-before")
    make_small_model(recipe, work, out)
    assert (work / "judge-1" / "model.safetensors").stat().st_mtime_ns == first
    assert (out / "judge" / "model.safetensors").read_bytes() == made


def test_a_model_is_shipped_in_half_the_bytes_and_says_the_same(tmp_path: Path) -> None:
    """float16 has 11 bits of mantissa: logits move by thousandths, P(yes) in the third decimal."""
    trained = write_model(tmp_path / "trained", 0)
    export_half_precision(trained, tmp_path / "shipped")
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("trained", "shipped"))
    assert {name: tensor.half() for name, tensor in full.items()}.keys() == half.keys()
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    asked = [(Turn("user", text),) for text in ("Is there a nodule?", "Is the margin smooth?")]
    before, after = (VisionLanguageModel(tmp_path / name).p_yes(asked) for name in ("trained", "shipped"))
    assert after == pytest.approx(before, abs=5e-3)
    assert not list(tmp_path.glob("*.partial"))
