"""Supervised fine-tuning: the loss by hand, what is frozen, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clincot.config import TrainConfig
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import PromptFormat
from clincot.records import Study
from clincot.training.checkpoint_writer import NonFiniteError
from clincot.training.margin_dpo import train_on_pairs
from clincot.training.rows import SFTRow
from clincot.training.sft import _SftLoop, plan_epoch_steps, train_on_rows
from tests.support.training_builders import LEFT, RIGHT, conversation, differing_crops

ANSWERS = ("yes", "no effusion", "smooth")


@pytest.fixture
def rows(studies: list[Study], folder: Path, views: PromptFormat) -> list[SFTRow]:
    """Three conversations an image, one of them with a region that the policy wrote."""
    return [
        SFTRow(
            f"row-{i}-{j}",
            conversation(study, folder, views, box=(LEFT, RIGHT)[j % 2], answer=ANSWERS[j], written=j == 2),
        )
        for i, study in enumerate(studies[:8])
        for j in range(3)
    ]


def _log(checkpoint: Path) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = json.loads((checkpoint / "train_log.json").read_text())
    return entries


def _changed(before: Path, after: Path) -> set[str]:
    """The modules whose weights differ between two checkpoints."""
    a, b = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert a.keys() == b.keys()
    return {name.split(".")[1] for name in a if not torch.equal(a[name], b[name])}


def test_the_first_loss_is_the_mean_over_all_action_tokens(
    policy_dir: Path, rows: list[SFTRow], tmp_path: Path
) -> None:
    """Not the mean of the rows' means: a row with a written region has more tokens and counts for more."""
    config = TrainConfig(lr=1e-30, batch_size=24, epochs=1)
    train_on_rows(rows, policy_dir, tmp_path / "out", config, progress=False)
    policy = VisionLanguageModel(policy_dir)
    conversations = [row.conversation for row in rows]
    tokens = sum(sum(policy.encoder.encode(c).actions) for c in conversations)
    (entry,) = _log(tmp_path / "out")
    assert entry["loss"] == pytest.approx(-sum(policy.compute_answer_logprobs(conversations)) / tokens, abs=1e-5)


def test_micro_batches_make_the_step_of_their_sum(policy_dir: Path, rows: list[SFTRow], tmp_path: Path) -> None:
    for name, parts in (("one", 1), ("four", 4)):
        config = TrainConfig(lr=1e-3, batch_size=24, grad_accumulation=parts, epochs=3, warmup_ratio=0.0)
        train_on_rows(rows, policy_dir, tmp_path / name, config, progress=False)
    losses = [[entry["loss"] for entry in _log(tmp_path / name)] for name in ("one", "four")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][2] < losses[0][0] - 0.1


def test_an_epoch_has_every_row_once_in_bounded_steps(policy_dir: Path, rows: list[SFTRow]) -> None:
    """An epoch has every row once, a step has 4 rows in 2 parts."""
    encoder = VisionLanguageModel(policy_dir).encoder
    encoded = [encoder.encode(row.conversation) for row in rows]
    config = TrainConfig(batch_size=4, grad_accumulation=2)
    steps = plan_epoch_steps(encoded, config, 0)
    parts = [[i for packed in part for i in packed] for step in steps for part in step]
    assert sorted(i for part in parts for i in part) == list(range(24))
    assert max(map(len, parts)) <= 2
    assert max(map(len, steps)) == 2
    packs = [packed for step in steps for part in step for packed in part]
    assert all(len({encoded[i].pictures[0].key for i in packed}) == 1 for packed in packs)
    assert steps == plan_epoch_steps(encoded, config, 0)
    assert steps != plan_epoch_steps(encoded, config, 1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TrainConfig(), {"connector", "text_model"}),
        (TrainConfig(train_projector=False), {"text_model"}),
        (TrainConfig(freeze_vision=False), {"vision_model", "connector", "text_model"}),
        (TrainConfig(lora_r=4), {"connector", "text_model"}),
        (TrainConfig(lora_r=4, train_projector=False), {"text_model"}),
    ],
)
def test_what_is_frozen_stays_as_it_is(
    config: TrainConfig,
    expected: set[str],
    policy_dir: Path,
    rows: list[SFTRow],
    tmp_path: Path,
) -> None:
    changed = config.model_copy(update={"lr": 1e-2, "batch_size": 8})
    train_on_rows(rows, policy_dir, tmp_path / "out", changed, progress=False)
    assert _changed(policy_dir, tmp_path / "out") == expected


def test_cached_features_and_pixels_give_the_same_losses(
    policy_dir: Path, rows: list[SFTRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast way (features once a picture, packs) against the plain way through the processor's pixels."""
    config = TrainConfig(lr=1e-3, batch_size=8, epochs=2)
    train_on_rows(rows, policy_dir, tmp_path / "fast", config, progress=False)
    original = VisionLanguageModel.__init__

    def unshared(self: VisionLanguageModel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.shares_features = False

    monkeypatch.setattr(VisionLanguageModel, "__init__", unshared)
    train_on_rows(rows, policy_dir, tmp_path / "plain", config, progress=False)
    losses = [[entry["loss"] for entry in _log(tmp_path / name)] for name in ("fast", "plain")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_sft_learns_the_answers_and_reports_held_out_loss(policy_dir: Path, rows: list[SFTRow], tmp_path: Path) -> None:
    one_answer = [row for row in rows if row.name.endswith("-1")]
    config = TrainConfig(lr=1e-2, batch_size=6, epochs=40)
    metrics = train_on_rows(
        one_answer[:6], policy_dir, tmp_path / "out", config, held_out=one_answer[6:], progress=False
    )
    assert metrics["held_out_loss"] < 0.5
    (generation,) = VisionLanguageModel(tmp_path / "out").generate(
        [one_answer[7].conversation[:-1]], max_new_tokens=8, temperature=0.0, seeds=[0]
    )
    assert generation.text == "no effusion"


class _Killed(Exception):
    pass


def test_an_interrupted_training_resumes_to_the_same_bytes(
    policy_dir: Path, rows: list[SFTRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(lr=1e-3, batch_size=8, epochs=2, save_steps=2)
    train_on_rows(rows, policy_dir, tmp_path / "whole", config, progress=False)
    original, computed = _SftLoop._train_step, []

    def dying(self: _SftLoop, *args: Any) -> float:
        if self.step == 5 and not computed.count(5):
            computed.append(5)
            raise _Killed
        computed.append(self.step)
        return original(self, *args)

    monkeypatch.setattr(_SftLoop, "_train_step", dying)
    with pytest.raises(_Killed):
        train_on_rows(rows, policy_dir, tmp_path / "out", config, progress=False)
    assert not (tmp_path / "out").exists()
    train_on_rows(rows, policy_dir, tmp_path / "out", config, progress=False)
    assert computed == [0, 1, 2, 3, 4, 5, 4, 5]  # 5 died; the last state was of step 4
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_a_loss_that_explodes_names_its_rows(policy_dir: Path, rows: list[SFTRow], tmp_path: Path) -> None:
    config = TrainConfig(lr=1e30, batch_size=1, warmup_ratio=0.0)
    with pytest.raises(NonFiniteError, match=r"step 2: .* row-\d-\d"):
        train_on_rows(rows[:2], policy_dir, tmp_path / "out", config, progress=False)
    assert not (tmp_path / "out").exists()


def test_sft_on_chosen_never_sees_the_rejected_side(
    policy_dir: Path, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    rows = differing_crops(studies[:4], folder, views)
    config = TrainConfig(loss="sft", lr=1e-3, batch_size=4, train_projector=False)
    train_on_pairs(rows, policy_dir, tmp_path / "pairs", config, progress=False)
    chosen = [SFTRow(row.pair, row.chosen) for row in rows]
    train_on_rows(chosen, policy_dir, tmp_path / "rows", config, progress=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("pairs", "rows")]
    assert weights[0] == weights[1]
    assert _changed(policy_dir, tmp_path / "pairs") == {"text_model"}


def test_no_rows_are_refused(policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows to train on"):
        train_on_rows([], policy_dir, tmp_path / "out", TrainConfig(), progress=False)
