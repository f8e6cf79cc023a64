"""A training run as files: the job that a worker reads, wherever it runs, and the results that it writes."""

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
    """A training run of several processes failed; the message contains the errors of the processes."""


class TrainingJob(FrozenModel):
    """The inputs and settings of a training run. The paths must be valid where the workers run."""

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
        """The folder of the launch: work.json, metrics.json, and failure.<rank> for each process that failed."""
        return self.checkpoint.with_name(self.checkpoint.name + ".launch")

    @property
    def result(self) -> Path:
        """The file with the metrics of the finished training."""
        return self.folder / "metrics.json"

    @property
    def digest(self) -> str:
        """Digest of everything that decides the result: configuration and inputs (images by their studies' digests)."""
        files = [self.data / "studies.jsonl", self.questions, self.regions, self.candidates, self.pairs]
        return hash_json(
            [self.config.digest, self.steps, self.sharding, hash_checkpoint(self.policy), *map(hash_files, files)]
        )


def locate_failure_file(job: TrainingJob, rank: int) -> Path:
    """The file in which a process writes why it failed."""
    return job.folder / f"failure.{rank}"


def read_failures(job: TrainingJob) -> list[str]:
    """The errors of the processes that failed, each once, in the order of the ranks."""
    paths = sorted(job.folder.glob("failure.*"), key=lambda path: int(path.suffix[1:]))
    return list(dict.fromkeys(path.read_text(encoding="utf-8") for path in paths))
