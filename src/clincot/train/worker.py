"""One process of a training run: `python -m clincot.train.worker WORK.json`, alone or started by torchrun.

What a process cannot do it says in `failure.<rank>` beside the work's result, for whoever started it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from pydantic import BaseModel, ConfigDict

from clincot.config import TrainSection
from clincot.conversation import load_views
from clincot.errors import BadInput, ForTheUser
from clincot.jsonl import write_json, written_aside
from clincot.run_folder import read_model
from clincot.train.margin_dpo import train_on_pairs
from clincot.train.rows import read_training_rows
from clincot.train.team import Team


class Work(BaseModel):
    """What is to be trained on what. Paths are those of the machine (or the shared volume) that the worker runs on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    section: TrainSection
    data: Path
    questions: Path
    regions: Path
    candidates: Path
    pairs: Path
    policy: Path
    steps: tuple[str, ...]
    checkpoint: Path  # where the trained policy goes
    result: Path  # where its metrics go; failure.<rank> beside it
    sharding: Literal["none", "fsdp"] = "none"


def train(work: Work) -> dict[str, float]:
    """Train in this process, or in its team; the metrics of margin_dpo.train_on_pairs."""
    rows = read_training_rows(
        pairs=work.pairs, candidates=work.candidates, regions=work.regions, questions=work.questions,
        studies=work.data / "studies.jsonl", folder=work.data, views=load_views(work.policy), steps=work.steps,
    )  # fmt: skip
    return train_on_pairs(list(rows), work.policy, work.checkpoint, work.section)


def failure_file(result: Path, rank: int) -> Path:
    return result.with_name(f"failure.{rank}")


def main() -> None:
    rank = int(os.environ.get("RANK", "0"))
    work = read_model(Path(sys.argv[1]), Work)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    PartialState(cpu=not torch.cuda.is_available())
    try:
        if work.section.loss == "sft" and Team.here().size > 1:
            raise BadInput("train.loss sft learns in one process; start it without a launch of several")
        metrics = train(work)
    except (ForTheUser, OSError) as error:
        with written_aside(failure_file(work.result, rank)) as file:
            file.write(str(error))
        raise SystemExit(1) from None
    if rank == 0:
        write_json(work.result, metrics)
    Team.here().wait()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
