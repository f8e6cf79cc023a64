"""Each family is trained as it is asked: on crops of different sizes, by margin-DPO and SFT, fully and by LoRA."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from clincot.config import TrainConfig
from clincot.geometry import Box, box_from_xyxy
from clincot.models.encoding import ChatTemplateError
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import ChainStep, Conversation, chain_prompt
from clincot.records import Study
from clincot.training import resolved_settings
from clincot.training.collate import (
    ConversationCollator,
    PairCollator,
    compute_action_logprobs,
    make_pixel_source,
)
from clincot.training.margin_dpo import MarginDPOTrainer, train_on_pairs
from clincot.training.rows import TrainingRow
from clincot.training.trained_parts import find_projectors, find_towers, freeze_modules
from tests.support.families import Family

LEFT = box_from_xyxy((0.05, 0.1, 0.4, 0.45))
WIDE = box_from_xyxy((0.1, 0.3, 0.95, 0.6))
TALL = box_from_xyxy((0.6, 0.05, 0.85, 0.95))
QUESTION = "Is there a nodule in the left lung?"
MARGINS = (0.2 / 0.6 / 2, 0.3 / 0.6 / 2)  # λ · gap / (τ + spread) of the two pairs
BOTH = pytest.mark.parametrize("method", [{}, {"lora_r": 4, "lora_alpha": 8}], ids=["full", "lora"])

# Where the parts are in the models of each class, by hand.
TOWERS = {"idefics3": "vision_model", "smolvlm": "vision_model"} | dict.fromkeys(
    ("qwen2-vl", "qwen2.5-vl", "qwen3-vl"), "visual"
)
PROJECTORS = {"idefics3": ("connector",), "smolvlm": ("connector",)} | {
    "qwen2-vl": ("visual.merger",),
    "qwen2.5-vl": ("visual.merger",),
    "qwen3-vl": ("visual.merger", "visual.deepstack_merger_list"),
    "llava-next": ("multi_modal_projector", "image_newline"),
    "llava-onevision": ("multi_modal_projector", "image_newline"),
}


@pytest.fixture
def rows(family: Family, model: VisionLanguageModel, studies: list[Study], films: Path) -> list[TrainingRow]:
    """Two pairs whose sides see other crops, in shape too; one side wrote its region, where the family can."""
    can_write = family.name != "paligemma"

    def ask(study: Study, box: Box, answer: str, *, written: bool = False) -> Conversation:
        return chain_prompt(study, films, model.views, [ChainStep(QUESTION, box, written, answer)])

    return [
        TrainingRow(
            "pair-0",
            ask(studies[0], LEFT, "yes", written=can_write),
            ask(studies[0], WIDE, "no effusion in the lung"),
            gap=0.2,
            spread=0.1,
        ),
        TrainingRow(
            "pair-1",
            ask(studies[1], TALL, "upper zone"),
            ask(studies[1], LEFT, "no", written=can_write),
            gap=0.3,
            spread=0.1,
        ),
    ]


def read_log(checkpoint: Path) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = json.loads((checkpoint / "train_log.json").read_text())
    return entries


def read_weights(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): value for name, value in model.model.named_parameters()}


def name_part(family: Family, weight: str) -> str:
    """The part of the model to which a weight belongs."""
    projectors = PROJECTORS.get(family.name, ("multi_modal_projector",))
    if weight.startswith(projectors):
        return "projector"
    return "tower" if weight.startswith(TOWERS.get(family.name, "vision_tower")) else "language model"


def compute_logprobs(model: VisionLanguageModel, rows: list[TrainingRow]) -> list[float]:
    return model.compute_answer_logprobs([side for row in rows for side in (row.chosen, row.rejected)])


def test_parts_are_found_by_name(family: Family, model: VisionLanguageModel) -> None:
    parts = {"tower": find_towers(model.model), "projector": find_projectors(model.model)}
    for part, modules in parts.items():
        assert modules
        for name in modules:
            assert name_part(family, name) == part


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("projector", [True, False])
def test_what_is_frozen(family: Family, model: VisionLanguageModel, vision: bool, projector: bool) -> None:
    freeze_modules(model.model, vision=vision, projector=projector)
    frozen = {name_part(family, name) for name, weight in read_weights(model).items() if not weight.requires_grad}
    trained = {name_part(family, name) for name, weight in read_weights(model).items() if weight.requires_grad}
    model.model.requires_grad_(True)
    expected = {part for part, is_frozen in (("tower", vision), ("projector", projector)) if is_frozen}
    assert frozen == expected
    assert trained == {"tower", "projector", "language model"} - expected


@BOTH
def test_first_loss_is_log1p_exp_margin(
    method: dict[str, Any], checkpoint: Path, rows: list[TrainingRow], tmp_path: Path
) -> None:
    """Both pairs in one batch, so that crops of several shapes are padded together."""
    config = TrainConfig(lr=1e-30, batch_size=2, nll_weight=0.0, **method)
    train_on_pairs(rows, checkpoint, tmp_path / "out", config, progress=False)
    (entry,) = read_log(tmp_path / "out")
    assert entry["margin_logits"] == pytest.approx(sum(MARGINS) / 2)
    assert entry["loss"] == pytest.approx(sum(math.log1p(math.exp(m)) for m in MARGINS) / 2, abs=1e-5)
    assert entry["reward_margin"] == pytest.approx(0.0, abs=1e-5)


def test_training_counts_what_inference_counts(model: VisionLanguageModel, rows: list[TrainingRow]) -> None:
    """Log-probabilities of a padded batch of pairs, in the mode of training, against each conversation alone."""
    collator = PairCollator(rows, MARGINS, ConversationCollator(model.encoder, make_pixel_source(model.encoder)))
    batch = collator([{"row": 0}, {"row": 1}])
    model.model.train()
    with torch.no_grad():
        ours = compute_action_logprobs(model.model, batch, 4).sum_N.tolist()
    model.model.eval()
    alone = [compute_logprobs(model, [row]) for row in rows]
    assert ours == pytest.approx([alone[0][0], alone[1][0], alone[0][1], alone[1][1]], abs=1e-4)


def test_every_trained_turn_ends_with_an_end_token(model: VisionLanguageModel, rows: list[TrainingRow]) -> None:
    """In the batch itself: the last owned token of each turn ends it, and no other owned token does."""
    collator = PairCollator(rows, MARGINS, ConversationCollator(model.encoder, make_pixel_source(model.encoder)))
    batch = collator([{"row": 0}, {"row": 1}])
    conversations = [rows[0].chosen, rows[1].chosen, rows[0].rejected, rows[1].rejected]
    for index, conversation in enumerate(conversations):
        owned_ST = batch["owners"] == index
        ids = batch["input_ids"][owned_ST].tolist()
        assert ids[-1] in model.encoder.end_ids
        assert sum(token in model.encoder.end_ids for token in ids) == sum(turn.action for turn in conversation)


@BOTH
@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, {"language model", "projector"}),
        ({"train_projector": False}, {"language model"}),
        ({"freeze_vision": False}, {"language model", "projector", "tower"}),
        ({"loss": "sft"}, {"language model", "projector"}),
    ],
    ids=["default", "language model", "vision", "sft"],
)
def test_one_step_changes_what_is_trained(
    changes: dict[str, Any],
    trained: set[str],
    method: dict[str, Any],
    family: Family,
    checkpoint: Path,
    model: VisionLanguageModel,
    rows: list[TrainingRow],
    tmp_path: Path,
) -> None:
    config = TrainConfig(lr=1e-2, batch_size=2, warmup_ratio=0.0, **method, **changes)
    metrics = train_on_pairs(rows, checkpoint, tmp_path / "out", config, progress=False)
    assert metrics["steps"] == 1
    before, after = read_weights(model), read_weights(VisionLanguageModel(tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert {name_part(family, name) for name in changed} == trained
    # of the tower, Llava does not use the last layer
    assert {
        name for name in before if "_proj.weight" in name and name_part(family, name) == "language model"
    } <= changed


def test_the_projector_has_a_rate_of_its_own(
    family: Family, checkpoint: Path, model: VisionLanguageModel, rows: list[TrainingRow], tmp_path: Path
) -> None:
    """Adam's first step is as long as the rate, whatever the gradient."""
    config = TrainConfig(lr=1e-3, projector_lr=5e-3, batch_size=2, warmup_ratio=0.0)
    train_on_pairs(rows, checkpoint, tmp_path / "out", config, progress=False)
    before, after = read_weights(model), read_weights(VisionLanguageModel(tmp_path / "out"))
    longest = dict.fromkeys(("language model", "projector", "tower"), 0.0)
    for name, weight in before.items():
        part = name_part(family, name)
        longest[part] = max(longest[part], float((weight - after[name]).abs().max()))
    assert longest["language model"] == pytest.approx(1e-3, rel=1e-2)
    assert longest["projector"] == pytest.approx(5e-3, rel=1e-2)
    assert longest["tower"] == 0


@BOTH
def test_the_saved_policy_is_the_trained_one(
    method: dict[str, Any],
    checkpoint: Path,
    model: VisionLanguageModel,
    rows: list[TrainingRow],
    tmp_path: Path,
) -> None:
    """Trained, merged, saved and loaded: the same logits, answers and end tokens; the adapter gives them too."""
    config = TrainConfig(lr=1e-2, batch_size=2, warmup_ratio=0.0, epochs=2, **method)
    trained = VisionLanguageModel(checkpoint)
    trainer = MarginDPOTrainer(trained, rows, config, tmp_path / "work")
    trainer.train()
    trained.model.eval()
    expected = compute_logprobs(trained, rows)
    assert expected != pytest.approx(compute_logprobs(model, rows), abs=1e-2)

    train_on_pairs(rows, checkpoint, tmp_path / "out", config, progress=False)
    loaded = VisionLanguageModel(tmp_path / "out")
    assert compute_logprobs(loaded, rows) == pytest.approx(expected, abs=1e-4)
    prompts = [row.chosen[:-1] for row in rows]
    encoded = [[one.encoder.encode(prompt, reply=True) for prompt in prompts] for one in (trained, loaded)]
    assert encoded[0] == encoded[1]
    logits = [one.compute_next_token_logprobs(of_one) for one, of_one in zip((trained, loaded), encoded, strict=True)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    answers = [one.generate(prompts, max_new_tokens=6, temperature=0.0, seeds=[0, 1]) for one in (trained, loaded)]
    assert [answer.text for answer in answers[0]] == [answer.text for answer in answers[1]]
    assert loaded.encoder.end_ids == model.encoder.end_ids

    if method:  # the adapter beside the merged weights, on the policy that was trained from
        base = VisionLanguageModel(checkpoint)
        base.model = PeftModel.from_pretrained(base.model, tmp_path / "out" / "adapter").merge_and_unload().eval()
        assert compute_logprobs(base, rows) == pytest.approx(expected, abs=1e-4)


def test_a_large_models_defaults_train_too(
    family: Family,
    checkpoint: Path,
    model: VisionLanguageModel,
    rows: list[TrainingRow],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if it had more than 1e9 parameters: LoRA, a trained projector and gradient checkpointing, in both losses."""
    monkeypatch.setattr(resolved_settings, "LARGE_MODEL_PARAMETERS", 1000)
    for loss in ("margin_dpo", "sft"):
        config = TrainConfig(lr=1e-3, batch_size=2, warmup_ratio=0.0, loss=loss)
        train_on_pairs(rows, checkpoint, tmp_path / loss, config, progress=False)
        settings = json.loads((tmp_path / loss / "train_settings.json").read_text())
        assert (settings["lora_r"], settings["projector_lr"], settings["gradient_checkpointing"]) == (128, 2e-5, True)
        after = VisionLanguageModel(tmp_path / loss)
        changed = {
            name_part(family, name)
            for name, weight in read_weights(model).items()
            if not torch.equal(weight, read_weights(after)[name])
        }
        assert changed == {"language model", "projector"}


def test_paligemma_trains_on_regions_of_a_grounder(
    family: Family,
    checkpoint: Path,
    model: VisionLanguageModel,
    studies: list[Study],
    films: Path,
    tmp_path: Path,
) -> None:
    if family.name != "paligemma":
        pytest.skip("the other families write their regions")
    sides = [
        chain_prompt(studies[0], films, model.views, [ChainStep(QUESTION, LEFT, True, answer)])
        for answer in ("yes", "no")
    ]
    rows = [TrainingRow("pair-0", sides[0], sides[1], gap=0.2, spread=0.1)]
    with pytest.raises(ChatTemplateError, match="regions of a grounder"):
        train_on_pairs(rows, checkpoint, tmp_path / "out", TrainConfig(batch_size=1), progress=False)
    assert not (tmp_path / "out").exists()
