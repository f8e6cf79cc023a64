"""The trainer against stock TRL, against numbers worked out by hand, and across interruptions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from clincot.config import TrainConfig
from clincot.errors import InvalidInput
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import Conversation, PromptFormat, collect_views, load_prompt_format
from clincot.records import Study
from clincot.training.checkpoint_writer import NonFiniteError, get_partial_folder
from clincot.training.margin import margin_logits
from clincot.training.margin_dpo import MarginDPOTrainer, train_on_pairs
from clincot.training.rows import TrainingRow
from tests.support.stock_dpo import train_stock_dpo
from tests.support.training_builders import differing_crops, shared_images

pytestmark = pytest.mark.slow

PLAIN = {"margin_lambda": 0.0, "nll_weight": 0.0, "warmup_ratio": 0.0, "lr": 1e-3, "beta": 0.5}


def _log(checkpoint: Path) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = json.loads((checkpoint / "train_log.json").read_text())
    return entries


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"lora_r": 4, "lora_alpha": 8}, id="lora"),
        pytest.param({"lr": 1e-4}, id="full"),
        pytest.param({"lr": 1e-4, "freeze_vision": False}, id="full-with-vision"),
        pytest.param({"lr": 1e-4, "train_projector": False}, id="language-model"),
        pytest.param({"lora_r": 4, "lora_alpha": 8, "train_projector": False}, id="lora-language-model"),
    ],
)
def test_lambda_zero_is_stock_dpo(
    changes: dict[str, Any], policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """Shared images on both sides, 5 steps: the same loss at every step, to 1e-6."""
    rows = shared_images(studies[:10], folder, views)
    config = TrainConfig(**PLAIN | {"batch_size": 2, "epochs": 1} | changes)
    train_on_pairs(rows, policy_dir, tmp_path / "ours", config, progress=False)
    ours = [entry["loss"] for entry in _log(tmp_path / "ours")]
    stock = train_stock_dpo(rows, policy_dir, config, tmp_path / "stock")
    assert len(ours) == 5
    assert ours == pytest.approx(stock, abs=1e-6)
    assert abs(ours[-1] - math.log(2)) > 1e-3  # and something was learned


def test_first_loss_is_log1p_exp_margin_for_each_pair(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """Batches of one pair at a learning rate of (almost) nothing: every step is a first step."""
    rows = differing_crops(studies[:4], folder, views)  # gaps 0.2, 0.3, 0.4, 0.5; spread 0.1
    config = TrainConfig(lr=1e-30, batch_size=1, nll_weight=0.0, margin_lambda=0.5, margin_tau=0.5, margin_cap=0.6)
    train_on_pairs(rows, policy_dir, tmp_path / "out", config, progress=False)
    # gap / 0.6, at most 0.6, times 0.5: 1/6, 1/4, 0.3 (0.667 clipped), 0.3
    margins = [0.2 / 0.6 / 2, 0.25, 0.3, 0.3]
    log = _log(tmp_path / "out")
    assert sorted(e["margin_logits"] for e in log) == pytest.approx(margins)
    assert sorted(e["margin_nats"] for e in log) == pytest.approx([m / 0.1 for m in margins])
    for entry in log:
        assert entry["loss"] == pytest.approx(math.log(1 + math.exp(entry["margin_logits"])), abs=1e-6)
        assert entry["reward_margin"] == pytest.approx(0.0, abs=1e-6)  # the added margin is not in it


def test_loss_on_differing_crops_by_hand(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """One pair, two steps: the second loss from two checkpoints' log-probabilities, each side with its own crop."""
    (row,) = differing_crops(studies[:1], folder, views)  # gap 0.2, spread 0.1
    config = TrainConfig(
        lr=1e-2,
        batch_size=1,
        epochs=2,
        warmup_ratio=0.0,
        beta=0.5,
        margin_lambda=1.0,
        margin_tau=0.5,
        nll_weight=0.2,
        save_steps=1,
        lora_r=0,
    )
    before = VisionLanguageModel(policy_dir)
    ref_w, ref_l = before.compute_answer_logprobs([row.chosen, row.rejected])
    policy = VisionLanguageModel(policy_dir)
    trainer = MarginDPOTrainer(policy, [row], config, tmp_path / "work")
    trainer.train()
    before.encoder.processor.save_pretrained(tmp_path / "work" / "checkpoint-1")
    after = VisionLanguageModel(tmp_path / "work" / "checkpoint-1")
    after.encoder = before.encoder
    pi_w, pi_l = after.compute_answer_logprobs([row.chosen, row.rejected])
    # m = 0.2 / (0.5 + 0.1) = 1/3; L = log(1 + exp(-(0.5 Δ - 1/3))) + 0.2 · NLL
    delta = (pi_w - ref_w) - (pi_l - ref_l)
    second = trainer.read_history()[1]
    expected = math.log1p(math.exp(-(0.5 * delta - 1 / 3))) + 0.2 * mean_turn_nll(after, row.chosen)
    assert second["loss"] == pytest.approx(expected, abs=2e-5)
    assert second["reward_margin"] == pytest.approx(0.5 * delta, abs=2e-5)
    assert second["chosen_logps"] == pytest.approx(pi_w, abs=2e-4)
    assert abs(delta) > 0.1


def test_image_pairs_add_a_dpo_loss_against_the_blanked_crop(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """At the start Δ = 0 for both: log(1 + e^m) + 0.5 · ln 2."""
    rows = differing_crops(studies[:2], folder, views)
    config = TrainConfig(
        lr=1e-2, batch_size=2, epochs=3, nll_weight=0.0, warmup_ratio=0.0, image_pair_weight=0.5, recipe="code"
    )
    train_on_pairs(rows, policy_dir, tmp_path / "out", config, progress=False)
    first, *_, last = _log(tmp_path / "out")
    by_pair = [math.log(1 + math.exp(gap)) for gap in (0.2, 0.3)]
    assert first["loss"] == pytest.approx(sum(by_pair) / 2 + 0.5 * math.log(2), abs=1e-5)
    assert first["image_pair_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["image_pair_loss"] != pytest.approx(math.log(2), abs=1e-5)  # the blanked side is another input


def mean_turn_nll(policy: VisionLanguageModel, conversation: Conversation) -> float:
    """Nats a token, over a turn's tokens and then over the turns: each turn alone, the other's tokens no actions."""
    acting = [index for index, turn in enumerate(conversation) if turn.action]
    means = []
    for index in acting:
        alone = tuple(replace(turn, action=at == index) for at, turn in enumerate(conversation))
        (logp,) = policy.compute_answer_logprobs([alone])
        means.append(-logp / sum(policy.encoder.encode(alone).actions))
    return sum(means) / len(means)


def test_the_anchor_is_the_chosen_sides_mean_turn_nll(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    (row,) = differing_crops(studies[:1], folder, views)
    policy = VisionLanguageModel(policy_dir)
    assert sum(turn.action for turn in row.chosen) == 2  # a region of many tokens and an answer of few
    nll = mean_turn_nll(policy, row.chosen)
    config = TrainConfig(lr=1e-30, batch_size=1, nll_weight=0.3, margin_lambda=0.0)
    train_on_pairs([row], policy_dir, tmp_path / "out", config, progress=False)
    (entry,) = _log(tmp_path / "out")
    assert entry["nll"] == pytest.approx(nll, abs=1e-5)
    assert entry["loss"] == pytest.approx(math.log(2) + 0.3 * nll, abs=1e-5)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_checkpoint_is_complete_and_prefers_chosen(
    lora_r: int, policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """A LoRA is merged: the folder loads like any policy, and what was trained is in it."""
    rows = differing_crops(studies[:4], folder, views)
    config = TrainConfig(lr=3e-3, batch_size=4, epochs=4, warmup_ratio=0.0, lora_r=lora_r, lora_alpha=8)
    metrics = train_on_pairs(rows, policy_dir, tmp_path / "out", config, progress=False)
    assert (metrics["pairs"], metrics["steps"]) == (4, 4)
    assert not get_partial_folder(tmp_path / "out").exists()
    assert load_prompt_format(tmp_path / "out") == views

    def delta(policy: VisionLanguageModel) -> float:
        chosen = policy.compute_answer_logprobs([row.chosen for row in rows])
        rejected = policy.compute_answer_logprobs([row.rejected for row in rows])
        return sum(chosen) - sum(rejected)

    merged = delta(VisionLanguageModel(tmp_path / "out"))
    assert merged > delta(VisionLanguageModel(policy_dir)) + 0.1
    assert (tmp_path / "out" / "adapter").exists() == (lora_r > 0)
    if lora_r:  # the adapter beside the merged weights, on the policy that was trained from, says the same
        base = VisionLanguageModel(policy_dir)
        PeftModel.from_pretrained(base.model, tmp_path / "out" / "adapter").merge_and_unload()
        assert delta(base) == pytest.approx(merged, abs=1e-3)
        assert str(policy_dir) not in (tmp_path / "out" / "adapter" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("fields", "searches"),
    [
        pytest.param({}, False, id="default"),
        pytest.param({"train_projector": False}, False, id="fixed projector"),
        pytest.param({"lora_r": 4, "lora_alpha": 8}, False, id="LoRA"),
        pytest.param({"freeze_vision": False}, True, id="vision tower"),
    ],
)
def test_ddp_searches_unused_parameters_only_if_there_are_some(
    policy_dir: Path,
    studies: list[Study],
    folder: Path,
    views: PromptFormat,
    tmp_path: Path,
    fields: dict[str, Any],
    searches: bool,
) -> None:
    """By default, TRL sets ddp_find_unused_parameters (DPOTrainer.__init__ in trl/trainer/dpo_trainer.py of TRL)."""
    rows = differing_crops(studies[:2], folder, views)
    trainer = MarginDPOTrainer(
        VisionLanguageModel(policy_dir), rows, TrainConfig(batch_size=2, **fields), tmp_path / "work"
    )
    trainer.train()
    handler = trainer.accelerator.ddp_handler
    assert handler is not None
    assert handler.find_unused_parameters is searches
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    stepped = {id(parameter) for parameter in trainer.optimizer.state}
    unused = {name for name, parameter in trainer.model.named_parameters() if id(parameter) not in stepped} & trained
    assert searches or not unused, unused


def test_the_reference_is_the_policy_that_the_round_starts_from(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    rows = differing_crops(studies[:3], folder, views)
    policy = VisionLanguageModel(policy_dir)
    sides = [
        policy.compute_answer_logprobs([r.chosen for r in rows]),
        policy.compute_answer_logprobs([r.rejected for r in rows]),
    ]
    config = TrainConfig(lr=1e-2, batch_size=2, lora_r=4, lora_alpha=8)
    trainer = MarginDPOTrainer(VisionLanguageModel(policy_dir), rows, config, tmp_path / "work")
    trainer.train()
    for side, expected in enumerate(sides):
        assert [r["ref_logps"][side] for r in trainer.train_dataset] == pytest.approx(expected, abs=1e-4)


def test_same_rows_policy_and_section_give_the_same_bytes(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    rows = differing_crops(studies[:6], folder, views)
    config = TrainConfig(batch_size=2, lora_r=4, lora_alpha=8)
    for name in ("a", "b"):
        train_on_pairs(rows, policy_dir, tmp_path / name, config, progress=False)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    other = config.model_copy(update={"seed": 1})
    train_on_pairs(rows, policy_dir, tmp_path / "c", other, progress=False)
    assert _log(tmp_path / "a") != _log(tmp_path / "c")


class _Killed(Exception):
    pass


def _kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the trainer die in this step's loss; returns the steps whose loss was computed."""
    computed: list[int] = []
    original = MarginDPOTrainer.compute_loss

    def dying(self: MarginDPOTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step + 1 == step:
            raise _Killed
        computed.append(self.state.global_step + 1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MarginDPOTrainer, "compute_loss", dying)
    return computed


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_resumed_training_has_the_same_losses_and_bytes(
    lora_r: int,
    policy_dir: Path,
    studies: list[Study],
    folder: Path,
    views: PromptFormat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = differing_crops(studies[:12], folder, views)
    config = TrainConfig(batch_size=2, lr=1e-3, save_steps=2, lora_r=lora_r, lora_alpha=8)
    train_on_pairs(rows, policy_dir, tmp_path / "whole", config, progress=False)
    with monkeypatch.context() as killing:
        _kill_at(6, killing)
        with pytest.raises(_Killed):
            train_on_pairs(rows, policy_dir, tmp_path / "out", config, progress=False)
    assert not (tmp_path / "out").exists()
    computed = _kill_at(99, monkeypatch)
    train_on_pairs(rows, policy_dir, tmp_path / "out", config, progress=False)
    assert computed == [5, 6]  # the last checkpoint was of step 4
    assert _log(tmp_path / "out") == _log(tmp_path / "whole")
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_a_step_has_its_batch_in_parts(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """8 pairs in steps of 4, in one pass or in two: 2 steps with the same losses."""
    rows = differing_crops(studies[:8], folder, views)
    logs = []
    for parts in (1, 2):
        config = TrainConfig(batch_size=4, grad_accumulation=parts, lr=1e-3)
        out = tmp_path / str(parts)
        assert train_on_pairs(rows, policy_dir, out, config, progress=False)["steps"] == 2
        logs.append([entry["dpo_loss"] for entry in _log(out)])
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)


def test_what_another_run_left_behind_is_not_resumed(
    policy_dir: Path,
    studies: list[Study],
    folder: Path,
    views: PromptFormat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = differing_crops(studies[:4], folder, views)
    config = TrainConfig(batch_size=2, save_steps=1)
    with monkeypatch.context() as killing:
        _kill_at(2, killing)
        with pytest.raises(_Killed):
            train_on_pairs(rows, policy_dir, tmp_path / "out", config, progress=False)
    computed = _kill_at(99, monkeypatch)
    train_on_pairs(rows, policy_dir, tmp_path / "out", config.model_copy(update={"lr": 1e-3}), progress=False)
    assert computed == [1, 2]


def test_a_pair_without_a_finite_reference_is_named(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """The crop of one rejected side has features that are not numbers."""
    rows = differing_crops(studies[:4], folder, views)
    policy = VisionLanguageModel(policy_dir)
    bad = collect_views(rows[2].rejected)[-1]
    sound = policy.encode_pictures

    def overflowing(pictures: Any) -> torch.Tensor:
        features_FTH = sound(pictures)
        features_FTH[[i for i, p in enumerate(pictures) if p.key == bad.key]] = math.nan
        return features_FTH

    policy.encode_pictures = overflowing  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"reference .* pair-2;"):
        MarginDPOTrainer(policy, rows, TrainConfig(batch_size=4, train_projector=False), tmp_path / "work")


def test_a_non_finite_loss_names_its_pairs_and_saves_nothing(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    rows = differing_crops(studies[:2], folder, views)
    config = TrainConfig(lr=1e30, warmup_ratio=0.0, batch_size=1, epochs=2, train_projector=False)
    with pytest.raises(NonFiniteError, match=r"step 2: .* 1 of 1 pairs: pair-[01];"):
        train_on_pairs(rows, policy_dir, tmp_path / "out", config, progress=False)
    assert not (tmp_path / "out").exists()


def test_no_pairs_are_refused(policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pairs to train on"):
        train_on_pairs([], policy_dir, tmp_path / "out", TrainConfig(), progress=False)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_bfloat16_follows_float32(
    lora_r: int, policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    rows = differing_crops(studies[:4], folder, views)
    config = TrainConfig(batch_size=2, epochs=2, lr=1e-3, lora_r=lora_r, lora_alpha=8)
    for dtype in ("float32", "bfloat16"):
        changed = config.model_copy(update={"dtype": dtype})
        train_on_pairs(rows, policy_dir, tmp_path / dtype, changed, progress=False)
    losses = [[e["loss"] for e in _log(tmp_path / dtype)] for dtype in ("float32", "bfloat16")]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    weights = load_file(tmp_path / "bfloat16" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_probes_are_logged_and_change_no_weight(
    policy_dir: Path,
    studies: list[Study],
    folder: Path,
    views: PromptFormat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twenty steps: probed at 0 and 10, or not at all, with the same weights at the end."""
    rows = differing_crops(studies[:10], folder, views)
    config = TrainConfig(**PLAIN | {"batch_size": 1, "epochs": 2, "nll_weight": 1.0, "margin_lambda": 1.0})
    metrics = train_on_pairs(rows, policy_dir, tmp_path / "probed", config, progress=False)
    log = _log(tmp_path / "probed")
    assert [entry["step"] - 1 for entry in log if "preference_share" in entry] == [0, 10]
    assert all(0 < entry["preference_share"] < 1 for entry in log if "preference_share" in entry)
    assert all("reward_margin_std" in entry and entry["margin_logits_max"] > 0 for entry in log)
    assert 0 < metrics["preference_share"] < 1
    monkeypatch.setattr("clincot.training.margin_dpo.can_probe", lambda *_, **__: False)
    train_on_pairs(rows, policy_dir, tmp_path / "plain", config, progress=False)
    assert not any("preference_share" in entry for entry in _log(tmp_path / "plain"))
    probed, plain = (
        {name: content for name, content in _bytes(tmp_path / run).items() if name != "train_log.json"}
        for run in ("probed", "plain")
    )
    assert probed == plain


def test_a_strong_anchor_leaves_the_preference_a_small_share(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path, caplog: Any
) -> None:
    """The anchor a thousand times as heavy: the run says that it is practically supervised training."""
    rows = differing_crops(studies[:4], folder, views)
    config = TrainConfig(**PLAIN | {"batch_size": 4, "epochs": 1, "nll_weight": 1000.0})
    metrics = train_on_pairs(rows, policy_dir, tmp_path / "out", config, progress=False)
    assert metrics["preference_share"] < 0.1
    assert "practically supervised training on the chosen answers" in caplog.text


def test_an_anchor_acts_through_the_nll_alone(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """Pair and anchor in one batch: the loss is (log(1 + e^m) + 2 NLL + 2 NLL) / 2, and pairs' means leave it out."""
    pair, other = differing_crops(studies[:2], folder, views)
    anchor = TrainingRow("anchor", other.chosen, other.chosen, gap=0.0, spread=0.0, anchor=True)
    config = TrainConfig(**PLAIN | {"batch_size": 2, "epochs": 1, "nll_weight": 2.0, "margin_lambda": 1.0})
    metrics = train_on_pairs([pair, anchor], policy_dir, tmp_path / "out", config, progress=False)
    (step,) = _log(tmp_path / "out")
    margin = margin_logits(pair.gap, pair.spread, config)
    assert step["margin_logits"] == pytest.approx(margin)
    assert step["dpo_loss"] == pytest.approx(math.log1p(math.exp(margin)), abs=1e-5)
    assert step["loss"] == pytest.approx(step["dpo_loss"] / 2 + 2 * step["nll"], abs=1e-5)
    assert (metrics["pairs"], metrics["anchors"]) == (1, 1)


def test_a_step_of_anchors_alone_has_no_values_of_pairs(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    pair, other = differing_crops(studies[:2], folder, views)
    anchor = TrainingRow("anchor", other.chosen, other.chosen, gap=0.0, spread=0.0, anchor=True)
    config = TrainConfig(**PLAIN | {"batch_size": 1, "epochs": 1, "nll_weight": 1.0})
    train_on_pairs([pair, anchor], policy_dir, tmp_path / "out", config, progress=False)
    with_pair, without = sorted(_log(tmp_path / "out"), key=lambda step: "dpo_loss" not in step)
    assert "reward_margin" in with_pair
    assert not {"dpo_loss", "reward_margin", "accuracy", "margin_logits"} & {*without}
    assert without["loss"] == pytest.approx(without["nll"], abs=1e-6)
    with pytest.raises(InvalidInput, match="no pairs to train on"):
        train_on_pairs([anchor], policy_dir, tmp_path / "none", config, progress=False)
