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

from clincot.errors import ForTheUser
from clincot.jsonl import read_model, write_json, written_aside
from clincot.processes import end_with_parent
from clincot.prompts import load_views
from clincot.training.distributed import Team
from clincot.training.fsdp import split_models
from clincot.training.job import Work, failure_file
from clincot.training.margin_dpo import train_on_pairs
from clincot.training.rows import read_training_rows

PATIENCE = timedelta(hours=1)  # while the first process writes a large checkpoint; NCCL's own is ten minutes


def train(work: Work) -> dict[str, float]:
    """Train in this process, or as one of its team; the metrics of margin_dpo.train_on_pairs."""
    rows = read_training_rows(
        pairs=work.pairs,
        candidates=work.candidates,
        regions=work.regions,
        questions=work.questions,
        studies=work.data / "studies.jsonl",
        folder=work.data,
        views=load_views(work.policy),
        steps=work.steps,
    )
    return train_on_pairs(list(rows), work.policy, work.checkpoint, work.section)


def main() -> None:
    """Exit code 1 where a process says why it cannot go on; torchrun then ends the others."""
    if "RANK" in os.environ:
        end_with_parent(signal.SIGKILL)
    work = read_model(Path(sys.argv[1]), Work)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if work.sharding == "fsdp":
        split_models()
    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)  # joins the team, if there is one
    team = Team.here()
    try:
        metrics = train(work)
    except (ForTheUser, OSError) as error:
        with written_aside(failure_file(work, team.rank)) as file:
            file.write(str(error))
        raise SystemExit(1) from None
    team.once(lambda: write_json(work.result, metrics))
    if team.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
