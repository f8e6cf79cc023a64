"""A tiny Idefics3 with real files, and conversations about real pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from clincot.geometry import Box, box_from_xyxy
from clincot.jsonl import hash_files
from clincot.prompts import ChainStep, Conversation, PromptFormat, chain_prompt
from clincot.records import Study
from clincot.synthetic.tiny_model import TinyModelSpec, build_tiny_model
from clincot.training.rows import TrainingRow

TINY = TinyModelSpec(
    vision_hidden=32, vision_layers=1, text_hidden=32, text_layers=2, patch_px=16, tokens_per_side=2, vocabulary=700
)
CORPUS = ["is there a nodule in the left lung right upper lower zone yes no effusion smooth spiculated"] * 3
LEFT, RIGHT = box_from_xyxy((0.05, 0.1, 0.4, 0.45)), box_from_xyxy((0.55, 0.4, 0.95, 0.8))
QUESTION = "is there a nodule in the left lung"


def build_policy(folder: Path) -> Path:
    build_tiny_model(folder, TINY, CORPUS)
    return folder


def build_studies(folder: Path, count: int) -> list[Study]:
    """`count` pictures of noise, 128 x 128 pixels."""
    rng = np.random.default_rng(7)
    studies = []
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        path = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(path)
        studies.append(Study(image=path.name, sha256=hash_files(path), width=128, height=128))
    return studies


def conversation(
    study: Study,
    folder: Path,
    views: PromptFormat,
    *,
    box: Box,
    answer: str,
    written: bool = False,
    question: str = QUESTION,
) -> Conversation:
    return chain_prompt(study, folder, views, [ChainStep(question, box, written, answer)])


def differing_crops(studies: list[Study], folder: Path, views: PromptFormat) -> list[TrainingRow]:
    """One pair a study: chosen looks left at a region that the policy wrote, rejected right at a tool's."""
    return [
        TrainingRow(
            pair=f"pair-{index}",
            chosen=conversation(study, folder, views, box=LEFT, answer="yes", written=True),
            rejected=conversation(study, folder, views, box=RIGHT, answer="no effusion"),
            gap=0.2 + 0.1 * index,
            spread=0.1,
        )
        for index, study in enumerate(studies)
    ]


def shared_images(studies: list[Study], folder: Path, views: PromptFormat) -> list[TrainingRow]:
    """One pair a study, both sides looking at the same crop that a tool gave: what stock TRL can express."""
    answers = [("yes", "no effusion"), ("smooth", "yes"), ("upper zone", "no")]
    rows = []
    for index, study in enumerate(studies):
        box = (LEFT, RIGHT)[index % 2]
        chosen, rejected = (conversation(study, folder, views, box=box, answer=a) for a in answers[index % 3])
        rows.append(TrainingRow(f"pair-{index}", chosen, rejected, gap=0.5, spread=0.1))
    return rows
