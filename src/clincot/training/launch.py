"""Start a training run: in this process, in several on this machine (torchrun) or on several nodes (TrainJob)."""

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

TERMINATE_TIMEOUT_S = 30.0  # time for torchrun to stop its workers before it is killed


def run_training(job: TrainingJob, launch: LaunchSettings) -> dict[str, float]:
    """Train as configured in `launch` and return the metrics; the checkpoint is then at `job.checkpoint`.

    A repeated call after an interruption continues from the last resumable checkpoint, on any number of processes.
    Raises TrainingFailed, InvalidInput, and whatever training in this process raises.
    """
    processes = _count_processes(launch)
    if job.config.loss == "sft" and (launch.job is not None or processes > 1):
        raise InvalidInput("train.loss sft trains in one process; launch it with how: here")
    if launch.sharding != "none":
        _check_sharding(job)
    if launch.job is not None:
        from clincot.training.kubeflow_trainer import train_on_nodes

        return train_on_nodes(job.model_copy(update={"sharding": launch.sharding}), launch.job)
    if processes == 1:
        from clincot.training.worker import train_in_process

        return train_in_process(job)
    return run_torchrun(job.model_copy(update={"sharding": launch.sharding}), processes)


def _check_sharding(job: TrainingJob) -> None:
    """Raise InvalidInput if the model would be trained by LoRA, whether the configuration or its size says so."""
    from clincot.training.resolved_settings import Device, count_checkpoint_parameters, resolve_settings

    config = job.config
    if not config.lora_r and not config.full_finetuning:
        parameters = count_checkpoint_parameters(job.policy)
        by_size = resolve_settings(config, parameters, Device(gpu=False, bfloat16=False)).lora_r > 0
        reason = f"the policy has {parameters / 1e9:.1f}e9 parameters, for which LoRA is the default; "
    else:
        by_size, reason = False, ""
    if config.lora_r or by_size:
        raise InvalidInput(
            f"FSDP with LoRA is not supported: {reason}a LoRA can only be merged into an unsharded model; "
            "set sharding: none, or train.full_finetuning: true (and train.lora_r: 0) to shard full fine-tuning"
        )


def _count_processes(launch: LaunchSettings) -> int:
    """The number of processes on this machine; raises InvalidInput if it does not fit the visible GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    if launch.how == "here" and gpus > 1:
        raise InvalidInput(f"launch.how here uses one GPU, but {gpus} are visible; set CUDA_VISIBLE_DEVICES to one")
    if launch.how == "torchrun" and gpus and launch.processes > gpus:
        raise InvalidInput(
            f"launch.processes is {launch.processes}, but there are {gpus} GPUs; set at most one process per GPU"
        )
    if launch.how in ("here", "train-job"):
        return 1
    if launch.how == "torchrun" and launch.processes:
        return launch.processes
    if launch.how == "torchrun" and not gpus:
        raise InvalidInput("no GPU is visible, so the number of torchrun's processes is unknown; set `processes`")
    return max(1, gpus)


def run_torchrun(job: TrainingJob, processes: int) -> dict[str, float]:
    """Train in several processes on this machine. If one fails, all are stopped and TrainingFailed says why."""
    shutil.rmtree(job.folder, ignore_errors=True)
    write_json(job.folder / "work.json", job.model_dump(mode="json"))
    code = _run_until_exit(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            "clincot.training.worker",
            str(job.folder / "work.json"),
        ]
    )
    if code != 0:
        errors = "; ".join(read_failures(job)) or (
            f"a training process ended without an error message (torchrun exited with {code}; its output is above); it "
            "was probably killed or ran out of memory. Run it again to continue from the last checkpoint of "
            "train.save_steps"
        )
        raise TrainingFailed(errors)
    metrics: dict[str, float] = read_json(job.result)
    shutil.rmtree(job.folder)
    return metrics


def _run_until_exit(command: list[str]) -> int:
    """Run a command and return its exit code; it never outlives this process, even if this process is killed."""
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
