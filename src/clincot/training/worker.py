"""One process of a training run: `python -m clincot.training.worker WORK.json`, alone or started by torchrun.

What a process cannot do it says in a file beside the work's result (training/job.py), for whoever started it.
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
from clincot.training.rows import read_training_rows

PROCESS_TIMEOUT = timedelta(hours=1)  # while the first process writes a large checkpoint; NCCL's own is ten minutes


def train_in_process(work: TrainingJob) -> dict[str, float]:
    """Train in this process, or as one of its team; the metrics of margin_dpo.train_on_pairs."""
    rows = read_training_rows(
        pairs=work.pairs,
        candidates=work.candidates,
        regions=work.regions,
        questions=work.questions,
        studies=work.data / "studies.jsonl",
        folder=work.data,
        views=load_prompt_format(work.policy),
        steps=work.steps,
    )
    return train_on_pairs(list(rows), work.policy, work.checkpoint, work.config)


def main() -> None:
    """Exit code 1 where a process says why it cannot go on; torchrun then ends the others."""
    if "RANK" in os.environ:
        end_with_parent(signal.SIGKILL)
    work = read_json_model(Path(sys.argv[1]), TrainingJob)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if work.sharding == "fsdp":
        enable_fsdp()
    PartialState(cpu=not torch.cuda.is_available(), timeout=PROCESS_TIMEOUT)  # joins the team, if there is one
    team = ProcessGroup.from_torch()
    try:
        metrics = train_in_process(work)
    except (UserError, OSError) as error:
        with atomic_write(locate_failure_file(work, team.rank)) as file:
            file.write(str(error))
        raise SystemExit(1) from None
    team.on_main_process(lambda: write_json(work.result, metrics))
    if team.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
