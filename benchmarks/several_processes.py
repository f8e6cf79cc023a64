"""Does training in several processes make what one makes? One process, two (gloo), and two that share a model (FSDP2).

`make bench-processes` prints the largest difference from one process's run, over all steps and over all weights. FSDP
on CPU is nothing that accelerate offers: its look at the kind of device is overridden here (`--worker`), which the
product does not do. The models are tiny; what is shown is the arithmetic, not speed.
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
    parser = argparse.ArgumentParser(description=__doc__)
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
    """Seconds of a run."""
    write_json(work.folder / "work.json", work.model_dump(mode="json"))
    began = time.monotonic()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            __file__,
            "--worker",
            str(work.folder / "work.json"),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return time.monotonic() - began


def _compare_runs(one: TrainingJob, two: TrainingJob) -> str:
    from safetensors.numpy import load_file

    logs = list(zip(_read_train_log(one), _read_train_log(two), strict=True))
    weights = [load_file(work.checkpoint / "model.safetensors") for work in (one, two)]
    if weights[0].keys() != weights[1].keys():
        raise SystemExit(f"other weights: {sorted(weights[0].keys() ^ weights[1].keys())}")
    cells = [max(abs(a[name] - b[name]) for a, b in logs) for name in COMPARED_METRICS]
    cells.append(max(float(abs(weights[0][name] - weights[1][name]).max()) for name in weights[0]))
    return " | ".join(f"{cell:.1e}" for cell in cells)


def _read_train_log(work: TrainingJob) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = json.loads((work.checkpoint / "train_log.json").read_text())
    return entries


def _run_worker(work: str) -> None:
    """clincot.training.worker, with accelerate told that these processes may split a model."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    from clincot.training.worker import main as train

    made = AcceleratorState.__init__

    def init(state: AcceleratorState, *args: object, **kwargs: object) -> None:
        made(state, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or state.__dict__.get("fsdp_plugin")
        if plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init
    sys.argv = ["clincot.training.worker", work]
    train()


if __name__ == "__main__":
    main()
