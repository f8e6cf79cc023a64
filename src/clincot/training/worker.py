"""One process of a training run: `python -m clincot.training.worker WORK.json`, started directly or by torchrun.

A process that fails writes the error to a file next to the result (training/job.py), where the launcher reads it.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from clincot.errors import UserError
from clincot.jsonl import atomic_write, read_json_model, write_json
from clincot.processes import end_with_parent
from clincot.prompts import load_prompt_format
from clincot.training.distributed import ProcessGroup
from clincot.training.fsdp import enable_fsdp
from clincot.training.job import TrainingJob, locate_failure_file
from clincot.training.margin_dpo import train_on_pairs
from clincot.training.rows import PairFiles, read_training_rows

# The others wait this long while the main process writes a large checkpoint; NCCL's default is ten minutes.
PROCESS_TIMEOUT = timedelta(hours=1)


def train_in_process(job: TrainingJob) -> dict[str, float]:
    """Train in this process, as part of its process group if any; returns the metrics of train_on_pairs."""
    rows = read_training_rows(
        PairFiles(job.pairs, job.candidates, job.regions, job.questions),
        job.data,
        load_prompt_format(job.policy),
        steps=job.steps,
        anchors_per_question=job.config.anchors,
        seed=job.config.seed,
    )
    return train_on_pairs(list(rows), job.policy, job.checkpoint, job.config)


def main() -> None:
    """Run the job of the file named on the command line; exits with 1 after a failure, so torchrun stops the others."""
    if "RANK" in os.environ:
        end_with_parent(signal.SIGKILL)
    job = read_json_model(Path(sys.argv[1]), TrainingJob)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if job.sharding == "fsdp":
        enable_fsdp()
    PartialState(cpu=not torch.cuda.is_available(), timeout=PROCESS_TIMEOUT)  # joins the process group, if any
    process_group = ProcessGroup.from_torch()
    try:
        metrics = train_in_process(job)
    except (UserError, OSError) as error:
        with atomic_write(locate_failure_file(job, process_group.rank)) as file:
            file.write(str(error))
        raise SystemExit(1) from None
    process_group.on_main_process(lambda: write_json(job.result, metrics))
    if process_group.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
