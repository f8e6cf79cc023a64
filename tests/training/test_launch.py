"""Several processes train what one trains, and go on where they were killed. Real torchrun over gloo, on CPU."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from clincot.config import TrainConfig
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord
from clincot.training.checkpoint_writer import get_partial_folder
from clincot.training.distributed import DistributedCollator, ProcessGroup, average_batch
from clincot.training.job import TrainingFailed, TrainingJob
from clincot.training.launch import run_training
from clincot.training.launch_settings import LaunchSettings, load_launch_settings
from clincot.training.worker import train_in_process
from tests.support.pair_files import write_work

pytestmark = pytest.mark.slow

TWO = LaunchSettings(how="torchrun", processes=2)
# Sums over a batch of 4 are made as (2 + 2), so they round differently: 1e-7 of a loss of about 2, and Adam divides by
# the root of squares that are as small. Measured over 10 steps: at most 5e-7.
ABOUT = 5e-6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """19 pairs, 2 epochs in batches of 4: the fifth batch of an epoch has 3 pairs, which two processes cannot halve."""
    config = TrainConfig(batch_size=4, epochs=2, lr=1e-3, save_steps=1, nll_weight=0.2)
    return write_work(tmp_path_factory.mktemp("work"), config)


@pytest.fixture(scope="module")
def alone(work: TrainingJob) -> list[dict[str, float]]:
    """The log of one process."""
    assert train_in_process(work)["pairs"] == 19
    return log_of(work.checkpoint)


def log_of(checkpoint: Path) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = json.loads((checkpoint / "train_log.json").read_text())
    return entries


def processes(rank: int) -> list[psutil.Process]:
    """The training processes of this rank below us."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "clincot.training.worker" in process.cmdline() and process.environ().get("RANK") == str(rank)
    ]


def when(path: Path, act: Callable[[], None]) -> threading.Thread:
    """Acts as soon as a file is there."""

    def watch() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not path.exists():
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_two_killed_processes_resume_the_loss_curve_of_one(work: TrainingJob, alone: list[dict[str, float]]) -> None:
    """One of the two is killed (SIGKILL) in the sixth of ten steps: the other one ends, nothing is published, and the
    second launch goes on from there. Every step's loss is the undisturbed single process's."""
    two = work.model_copy(update={"checkpoint": work.checkpoint.with_name("two")})
    fifth = get_partial_folder(two.checkpoint) / "checkpoint-5" / "complete"
    killer = when(fifth, lambda: os.kill(processes(1)[0].pid, signal.SIGKILL))
    with pytest.raises(TrainingFailed, match="a training process ended without an error message"):
        run_training(two, TWO)
    killer.join()
    assert processes(0) == processes(1) == []
    assert not two.checkpoint.exists()
    kept = get_partial_folder(two.checkpoint).glob("checkpoint-*/complete")
    assert 5 <= max(int(path.parent.name.rpartition("-")[2]) for path in kept) < 10
    metrics = run_training(two, TWO)
    assert metrics["pairs"] == 19
    log = log_of(two.checkpoint)
    assert [entry["step"] for entry in log] == list(range(1, 11))
    for name in ("loss", "dpo_loss", "nll", "reward_margin", "accuracy", "grad_norm", "learning_rate"):
        assert [entry[name] for entry in log] == pytest.approx([entry[name] for entry in alone], abs=ABOUT), name
    assert abs(alone[0]["loss"] - alone[-1]["loss"]) > 1000 * ABOUT  # the curve is one
    # the same files, and weights as near as the rounding of ten steps of Adam leaves them
    assert {p.name for p in two.checkpoint.iterdir()} == {p.name for p in work.checkpoint.iterdir()}
    ours, theirs = (load_file(w.checkpoint / "model.safetensors") for w in (two, work))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=2e-4, msg=name)
    assert not two.folder.exists()
    assert not get_partial_folder(two.checkpoint).exists()


def test_a_loss_that_is_not_finite_stops_both_processes_by_name(tmp_path: Path) -> None:
    """A learning rate of 1e30: the first step is fine, the second one's loss is NaN on both; they name the pairs."""
    config = TrainConfig(batch_size=4, epochs=2, lr=1e30, warmup_ratio=0.0, max_grad_norm=1e30, train_projector=False)
    work = write_work(tmp_path, config, studies=3, extra=0)
    with pytest.raises(TrainingFailed, match=r"step 2: the loss is not finite for 4 of 4 pairs: pair-.*Lower train.lr"):
        run_training(work, TWO)
    assert not work.checkpoint.exists()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"train.batch_size is 5, which 2 processes cannot share evenly"):
        ProcessGroup(0, 2).per_process_batch(5)
    assert ProcessGroup(1, 4).per_process_batch(32) == 8


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_mean_over_the_team_is_the_mean_over_the_batch(count: int, size: int) -> None:
    """Losses 1, 2, 4, 8, …: every pair counts once, wherever the batch is cut."""

    class Losses:
        sides = 2

        def __call__(self, examples: object) -> dict[str, torch.Tensor]:
            return {"loss": torch.tensor(examples)}

    batch = [2.0**n for n in range(count)]
    parts = [DistributedCollator(Losses(), ProcessGroup(rank, size))(batch) for rank in range(size)]  # type: ignore[arg-type]
    assert len({len(part["loss"]) for part in parts}) == 1  # all processes do the same work, or one waits for ever
    mean = sum(float(average_batch(part["loss"], part)) for part in parts) / size
    assert mean == pytest.approx(sum(batch) / count)


def test_sft_is_refused_in_several_processes(work: TrainingJob) -> None:
    sft = work.model_copy(update={"config": work.config.model_copy(update={"loss": "sft"})})
    with pytest.raises(InvalidInput, match="trains in one process"):
        run_training(sft, TWO)


def test_a_lora_is_not_split(work: TrainingJob) -> None:
    lora = work.model_copy(update={"config": work.config.model_copy(update={"lora_r": 4})})
    with pytest.raises(InvalidInput, match="set sharding: none"):
        run_training(lora, TWO.model_copy(update={"sharding": "fsdp"}))


def test_torchrun_without_a_gpu_has_to_be_told_how_many(work: TrainingJob) -> None:
    with pytest.raises(InvalidInput, match="set `processes`"):
        run_training(work, LaunchSettings(how="torchrun"))


def test_a_launch_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text("how: torchrun\nprocesses: 4\nsharding: fsdp\n")
    assert load_launch_settings(path) == LaunchSettings(how="torchrun", processes=4, sharding="fsdp")
    assert load_launch_settings(None).how == "auto"
    for content, message in (
        ("how: train-job\n", "`job` must be set for how: train-job, and only then"),
        ("processes: 2\n", "`processes` can only be set for how: torchrun"),
        ("how: here\nsharding: fsdp\n", "one process cannot shard a model"),
        ("nodes: 2\n", "Extra inputs are not permitted"),
    ):
        path.write_text(content)
        with pytest.raises(InvalidRecord, match=message):
            load_launch_settings(path)


def test_a_large_model_is_not_split_unless_all_is_trained(work: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA is its default, so FSDP needs full fine-tuning to be asked for."""
    monkeypatch.setattr("clincot.training.resolved_settings.LARGE_MODEL_PARAMETERS", 1000)
    split = TWO.model_copy(update={"sharding": "fsdp"})
    with pytest.raises(InvalidInput, match=r"FSDP with LoRA is not supported: the policy has .* parameters"):
        run_training(work, split)
    full = work.model_copy(update={"config": work.config.model_copy(update={"full_finetuning": True})})
    with pytest.raises(TrainingFailed, match="there are none here"):  # past this check: no GPU to split it among
        run_training(full, split)
