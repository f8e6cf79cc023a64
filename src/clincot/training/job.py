"""A training run as files: what a worker is given, wherever it is started, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from clincot.config import TrainSection
from clincot.errors import ForTheUser
from clincot.jsonl import file_digest
from clincot.models.checkpoint import checkpoint_digest
from clincot.records import digest_of

INPUTS = ("data", "questions", "regions", "candidates", "pairs", "policy")
Sharding = Literal["none", "fsdp"]


class TrainingFailed(ForTheUser, RuntimeError):
    """A training run of several processes ended badly; says what the processes said."""


class Work(BaseModel):
    """What is trained on what. Paths are those of the machine, or of the shared volume, that the workers see."""

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
        return digest_of(
            [self.section.digest, self.steps, self.sharding, checkpoint_digest(self.policy), *map(file_digest, files)]
        )


def failure_file(work: Work, rank: int) -> Path:
    return work.folder / f"failure.{rank}"


def failures(work: Work) -> list[str]:
    """What the processes said that could not go on, each once, in the order of the ranks."""
    found = sorted(work.folder.glob("failure.*"), key=lambda path: int(path.suffix[1:]))
    return list(dict.fromkeys(path.read_text(encoding="utf-8") for path in found))
