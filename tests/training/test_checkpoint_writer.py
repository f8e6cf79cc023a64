"""What is trained of a model, at which rate, and how a checkpoint appears."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clincot.config import TrainConfig
from clincot.models.checkpoint import hash_checkpoint
from clincot.models.vlm import load_checkpoint
from clincot.prompts import load_prompt_format
from clincot.training.checkpoint_writer import (
    average_last_steps,
    build_cosine_schedule,
    get_partial_folder,
    open_partial_folder,
    save_checkpoint,
)
from clincot.training.resolved_settings import Device, resolve_settings

SETTINGS = resolve_settings(TrainConfig(), 1000, Device(gpu=False, bfloat16=False))


def test_learning_rate_warms_up_and_decays_as_a_cosine() -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_cosine_schedule(optimiser, 0.2, 10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    # 2 steps of warm-up: 2 · 1/2, 2 · 2/2; then 2 · (1 + cos(π · k / 8)) / 2 for k = 0 … 7
    assert rates[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert rates[6] == pytest.approx(1.0)  # k = 4: half way down
    assert rates[4] == pytest.approx(1 + 2**-0.5)  # k = 2: cos(π / 4)
    assert rates[9] > 0


def test_a_run_of_one_step_learns_at_the_full_rate() -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    assert build_cosine_schedule(optimiser, 0.1, 1).get_last_lr() == [2.0]


def test_a_checkpoint_is_replaced_only_by_a_complete_one(policy_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "older").touch()
    open_partial_folder(out, "run")
    model, processor = load_checkpoint(str(policy_dir))
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(
            model, processor, load_prompt_format(policy_dir), out, settings=SETTINGS, log=[{"loss": object()}]
        )  # type: ignore[dict-item]
    assert [p.name for p in out.iterdir()] == ["older"]
    save_checkpoint(model, processor, load_prompt_format(policy_dir), out, settings=SETTINGS, log=[{"loss": 1.0}])
    assert not (out / "older").exists()
    added = {"train_log.json", "train_settings.json"}
    assert {p.name for p in policy_dir.iterdir()} | added == {p.name for p in out.iterdir()}
    assert not get_partial_folder(out).exists()


def test_the_digest_does_not_depend_on_where_a_processor_was_loaded_from(policy_dir: Path, tmp_path: Path) -> None:
    """transformers 5.19.0 forces local_files_only where HF_HUB_OFFLINE is set, and writes it into the tokenizer."""
    model, processor = load_checkpoint(str(policy_dir))
    digests = []
    for offline in (False, True):
        processor.tokenizer.init_kwargs["local_files_only"] = offline
        out = tmp_path / str(offline)
        save_checkpoint(model, processor, load_prompt_format(policy_dir), out, settings=SETTINGS, log=[{"loss": 1.0}])
        digests.append(hash_checkpoint(out))
    assert digests[0] == digests[1]


def test_what_an_untold_run_left_behind_is_thrown_away(tmp_path: Path) -> None:
    folder = open_partial_folder(tmp_path / "out", "one")
    (folder / "resume.pt").touch()
    assert (open_partial_folder(tmp_path / "out", "one") / "resume.pt").exists()
    assert not (open_partial_folder(tmp_path / "out", "another") / "resume.pt").exists()


def test_tail_means_are_of_the_last_tenth() -> None:
    log = [{"step": float(i), "loss": float(i)} for i in range(20)]
    assert average_last_steps(log) == {"loss": 18.5}  # steps 18 and 19
