"""Agreement of training in several processes with training in one.

    python -m benchmarks.several_processes            (make bench-processes)

Trains a tiny model in one process, in two (gloo), and in two that shard the model (FSDP2), and prints the largest
differences from the first run over all steps and all weights. They should be within floating-point error; nothing is
checked. Times are not meaningful for such a small model.

accelerate does not support FSDP on CPU, so `--worker` overrides its detection of the device; the product does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clincot.config import TrainConfig
from clincot.jsonl import write_json
from clincot.training.job import TrainingJob
from tests.support.pair_files import write_work

COMPARED_METRICS = ("loss", "grad_norm", "chosen_logps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("work", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _run_worker(args.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(batch_size=4, epochs=2, lr=1e-3, nll_weight=0.2, save_steps=4)
        one = write_work(Path(folder), config)
        seconds = _time_training(one, processes=1)
        print(
            "| processes | model | steps | "
            + " | ".join(f"max Δ {name}" for name in COMPARED_METRICS)
            + " | max Δ weight | s |"
        )
        print("|---" * (len(COMPARED_METRICS) + 5) + "|")
        print(
            f"| 1 | whole | {len(_read_train_log(one))} | " + "– | " * (len(COMPARED_METRICS) + 1) + f"{seconds:.0f} |"
        )
        for name in ("none", "fsdp"):
            two = one.model_copy(update={"checkpoint": one.checkpoint.with_name(name), "sharding": name})
            seconds = _time_training(two, processes=2)
            model = "whole" if name == "none" else "split"
            print(f"| 2 | {model} | {len(_read_train_log(two))} | {_compare_runs(one, two)} | {seconds:.0f} |")


def _time_training(work: TrainingJob, *, processes: int) -> float:
    """Run the training and return its duration in seconds."""
    write_json(work.folder / "work.json", work.model_dump(mode="json"))
    started = time.monotonic()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "--module",
            "benchmarks.several_processes",
            "--worker",
            str(work.folder / "work.json"),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return time.monotonic() - started


def _compare_runs(one: TrainingJob, two: TrainingJob) -> str:
    """Return the cells of a row: the largest differences of the logged metrics and of the weights."""
    from safetensors.numpy import load_file

    logs = list(zip(_read_train_log(one), _read_train_log(two), strict=True))
    weights = [load_file(work.checkpoint / "model.safetensors") for work in (one, two)]
    if weights[0].keys() != weights[1].keys():
        raise SystemExit(f"the checkpoints have different weights: {sorted(weights[0].keys() ^ weights[1].keys())}")

    def find_largest_difference(metric: str) -> float:
        return max(abs(a[metric] - b[metric]) for a, b in logs)

    cells = [find_largest_difference(metric) for metric in COMPARED_METRICS]
    cells.append(max(float(abs(weights[0][name] - weights[1][name]).max()) for name in weights[0]))
    return " | ".join(f"{cell:.1e}" for cell in cells)


def _read_train_log(work: TrainingJob) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = json.loads((work.checkpoint / "train_log.json").read_text())
    return entries


def _run_worker(work: str) -> None:
    """Run clincot.training.worker after patching accelerate, so that processes on CPU may shard a model."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    from clincot.training.worker import main as train

    original_init = AcceleratorState.__init__

    def init(state: AcceleratorState, *args: object, **kwargs: object) -> None:
        original_init(state, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or state.__dict__.get("fsdp_plugin")
        if plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init
    sys.argv = ["clincot.training.worker", work]
    train()


if __name__ == "__main__":
    main()
