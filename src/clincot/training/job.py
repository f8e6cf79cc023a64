"""A training run as files: what a worker is given, wherever it is started, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clincot.config import TrainConfig
from clincot.errors import UserError
from clincot.fields import FrozenModel
from clincot.jsonl import hash_files
from clincot.models.checkpoint import hash_checkpoint
from clincot.records import hash_json

INPUT_NAMES = ("data", "questions", "regions", "candidates", "pairs", "policy")
Sharding = Literal["none", "fsdp"]


class TrainingFailed(UserError, RuntimeError):
    """A training run of several processes ended badly; says what the processes said."""


class TrainingJob(FrozenModel):
    """What is trained on what. Paths are those of the machine, or of the shared volume, that the workers see."""

    config: TrainConfig
    data: Path
    questions: Path
    regions: Path
    candidates: Path
    pairs: Path
    policy: Path
    steps: tuple[str, ...]
    checkpoint: Path  # where the trained policy goes
    sharding: Sharding = "none"

    @property
    def folder(self) -> Path:
        """Of the launch: the work itself, `metrics.json`, and `failure.<rank>` of a process that could not go on."""
        return self.checkpoint.with_name(self.checkpoint.name + ".launch")

    @property
    def result(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def digest(self) -> str:
        """Of what decides the result: the section, and what is in the inputs (images by their studies' digests)."""
        files = [self.data / "studies.jsonl", self.questions, self.regions, self.candidates, self.pairs]
        return hash_json(
            [self.config.digest, self.steps, self.sharding, hash_checkpoint(self.policy), *map(hash_files, files)]
        )


def locate_failure_file(work: TrainingJob, rank: int) -> Path:
    return work.folder / f"failure.{rank}"


def read_failures(work: TrainingJob) -> list[str]:
    """What the processes said that could not go on, each once, in the order of the ranks."""
    found = sorted(work.folder.glob("failure.*"), key=lambda path: int(path.suffix[1:]))
    return list(dict.fromkeys(path.read_text(encoding="utf-8") for path in found))
