"""Starts a training run: in this process, in several of this machine (torchrun), or on several nodes (a TrainJob)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from functools import partial

from clincot.errors import InvalidInput
from clincot.jsonl import read_json, write_json
from clincot.processes import end_with_parent
from clincot.training.job import TrainingFailed, TrainingJob, read_failures
from clincot.training.launch_settings import LaunchSettings

TERMINATE_TIMEOUT_S = 30.0  # for torchrun to end its workers


def run_training(work: TrainingJob, launch: LaunchSettings) -> dict[str, float]:
    """Train as launched; the checkpoint is at `work.checkpoint` when it returns. The metrics of the training.

    Run again after it was interrupted, it goes on from the last resumable checkpoint, on any number of processes.
    Raises TrainingFailed, and what training in this process raises.
    """
    processes = _count_processes(launch)
    if work.config.loss == "sft" and (launch.job is not None or processes > 1):
        raise InvalidInput("train.loss sft learns in one process; launch it as how: here")
    if work.config.lora_r and launch.sharding != "none":
        raise InvalidInput("a LoRA is merged into a whole model; set sharding: none, or train.lora_r: 0")
    if launch.job is not None:
        from clincot.training.kubeflow_trainer import train_on_nodes

        return train_on_nodes(work.model_copy(update={"sharding": launch.sharding}), launch.job)
    if processes == 1:
        from clincot.training.worker import train_in_process

        return train_in_process(work)
    return run_torchrun(work.model_copy(update={"sharding": launch.sharding}), processes)


def _count_processes(launch: LaunchSettings) -> int:
    import torch

    gpus = torch.cuda.device_count()
    if launch.how == "here" and gpus > 1:
        raise InvalidInput(f"one process was asked for, but sees {gpus} GPUs; set CUDA_VISIBLE_DEVICES to one of them")
    if launch.how == "torchrun" and gpus and launch.processes > gpus:
        raise InvalidInput(
            f"launch.processes is {launch.processes}, but there are {gpus} GPUs; it is one process a GPU"
        )
    if launch.how in ("here", "train-job"):
        return 1
    if launch.how == "torchrun" and launch.processes:
        return launch.processes
    if launch.how == "torchrun" and not gpus:
        raise InvalidInput("no GPU is visible, so torchrun does not know how many processes to start; say `processes`")
    return max(1, gpus)


def run_torchrun(work: TrainingJob, processes: int) -> dict[str, float]:
    """Train in so many processes of this machine. If one of them dies, all end, and TrainingFailed says why."""
    shutil.rmtree(work.folder, ignore_errors=True)
    write_json(work.folder / "work.json", work.model_dump(mode="json"))
    code = _run_until_exit(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            "clincot.training.worker",
            str(work.folder / "work.json"),
        ]
    )
    if code != 0:
        said = "; ".join(read_failures(work)) or (
            f"a training process ended without a word (torchrun: {code}; what it printed stands above): killed, or out "
            "of memory. Run it again: it goes on from the last checkpoint of train.save_steps"
        )
        raise TrainingFailed(said)
    metrics: dict[str, float] = read_json(work.result)
    shutil.rmtree(work.folder)
    return metrics


def _run_until_exit(command: list[str]) -> int:
    """The exit code of a command that does not outlive this process, however that ends."""
    end_with_this_process = partial(end_with_parent, signal.SIGTERM, parent=os.getpid())
    process = subprocess.Popen(command, preexec_fn=end_with_this_process)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=TERMINATE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
