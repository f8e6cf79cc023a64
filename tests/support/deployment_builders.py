"""Small published checkpoints: real files without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from clincot.config import PublishConfig
from clincot.geometry import Box
from clincot.jsonl import write_records
from clincot.models.checkpoint import hash_checkpoint
from clincot.records import Checkpoint, Decision, Interval
from clincot.registry.manifest import GoldenQuestion, Manifest
from clincot.registry.publication import PublicationEvidence, copy_golden_image, register_checkpoint
from clincot.storage.store import Store

LINE = "chest"
BOX = Box(x0=0.1, y0=0.2, x1=0.4, y1=0.6)


def write_checkpoint(folder: Path, value: float, *, parent: str = "", round_: int = 0) -> Path:
    """Write a checkpoint folder as training does, with all weights equal to `value`."""
    folder.mkdir(parents=True)
    save_file({"w": np.full(4, value, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "idefics3"}\n')
    (folder / "train_log.json").write_text("[]\n")
    if parent:
        record = Checkpoint(
            uri=str(folder),
            sha256=hash_checkpoint(folder),
            parent=parent,
            pairs="pairs",
            config="config",
            round=round_,
        )
        write_records(folder / "record.json", [record])
    return folder


def decided(champion: str, challenger: str, verdict: str = "promote") -> Decision:
    return Decision.model_validate(
        {
            "champion": champion,
            "challenger": challenger,
            "benchmark": "b" * 64,
            "metric": "correct, arm written",
            "difference": Interval(value=0.1, low=0.02, high=0.18, n=200, clusters=24),
            "verdict": verdict,
            "reasons": ("The lower end is above 0.",),
        }
    )


def golden(folder: Path, answers: tuple[str, ...] = ("yes", "no")) -> list[GoldenQuestion]:
    """Golden questions about uniform images in folder/golden."""
    questions = []
    for number, answer in enumerate(answers):
        path = folder / f"{number}.png"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16), 40 * number, np.uint8)).save(path)
        image, digest = copy_golden_image(path, folder)
        questions.append(
            GoldenQuestion(
                question=f"Is there a nodule in film {number}?", image=image, sha256=digest, answer=answer, box=BOX
            )
        )
    return questions


def published(
    store: Store, folder: Path, value: float, *, over: Manifest | None = None, verdict: str = "promote"
) -> Manifest:
    """Publish a checkpoint. over: the one that it was trained from and compared with."""
    checkpoint = write_checkpoint(
        folder / f"checkpoint-{value}", value, parent=over.sha256 if over else "", round_=1 if over else 0
    )
    decision = decided(over.measured, hash_checkpoint(checkpoint), verdict) if over else None
    evidence = PublicationEvidence(
        decision=decision, golden=golden(folder / f"golden-{value}"), images=folder / f"golden-{value}"
    )
    return register_checkpoint(store, checkpoint, PublishConfig(name=LINE), evidence)
