"""The least that the stages run on: a data set of six bright squares, and untrained checkpoints with real files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clincot.config import Params
from clincot.geometry import box_from_pixels
from clincot.jsonl import hash_files, write_records
from clincot.records import Question, Reference, Study
from clincot.synthetic.tiny_model import TinyModelSpec, build_tiny_model

SIDE = 128
CORPUS = ["Is there a nodule in the left lung? Which zone is the nodule in? upper lower yes no effusion"] * 3


def write_set(
    folder: Path,
    *,
    studies: int = 6,
    key: bool = True,
    seed: int = 0,
    patients: int | None = None,
    shapes: Sequence[tuple[int, int]] = ((SIDE, SIDE),),
) -> Path:
    """`studies` films of noise with a bright square (the nodule) each, and two questions about each of them.

    shapes: (width, height) of the films in pixels, taken in turn.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    films, questions, references = [], [], []
    for number in range(studies):
        width, height = shapes[number % len(shapes)]
        pixels = rng.integers(10, 80, (height, width)).astype(np.uint8)
        x, y = int(rng.integers(4, width - 28)), int(rng.integers(4, height - 28))
        pixels[y : y + 24, x : x + 24] = 240
        name = f"images/{number}.png"
        Image.fromarray(pixels).save(folder / name)
        films.append(
            Study(
                image=name,
                sha256=hash_files(folder / name),
                width=width,
                height=height,
                patient=f"{seed}-{number % (patients or studies)}",
            )
        )
        boxes = (box_from_pixels(x, y, x + 24, y + 24, width=width, height=height),)
        zone = "upper" if y + 12 < height / 2 else "lower"
        for text, kind, topic, answer in (
            ("Is there a nodule in the left lung?", "closed", "presence", "yes"),
            ("Which zone is the nodule in?", "open", "zone", zone),
        ):
            question = Question.model_validate({"study": films[-1].id, "text": text, "kind": kind, "topic": topic})
            questions.append(question)
            references.append(Reference(question=question.id, answer=answer, boxes=boxes, finding="nodule"))
    write_records(folder / "studies.jsonl", films)
    write_records(folder / "questions.jsonl", questions)
    if key:
        write_records(folder / "references.jsonl", references)
    return folder


def write_model(folder: Path, seed: int, *, text_layers: int = 1) -> Path:
    """An untrained checkpoint of its own digest."""
    spec = TinyModelSpec(
        vision_hidden=32,
        vision_layers=1,
        text_hidden=32,
        text_layers=text_layers,
        patch_px=16,
        tokens_per_side=2,
        vocabulary=700,
        seed=seed,
    )
    build_tiny_model(folder, spec, CORPUS)
    return folder


def params(judges: list[Path], **sections: dict[str, object]) -> Params:
    """Settings with which untrained judges still make pairs: their scores are hardly apart."""
    content: dict[str, dict[str, object]] = {
        "prepare": {"rounds": 1},
        "propose": {"grounders": {"windows": 2, "random": 1}, "window_sides": [0.5], "hypotheses": 2},
        "answer": {"max_new_tokens": 3, "batch_size": 32},
        "judge": {"judges": [{"name": path.name, "path": str(path)} for path in judges], "calibration": "identity"},
        "pair": {"min_gap": 1e-5, "length_auc_tolerance": 0.5},
        "train": {"batch_size": 4, "lr": 1e-3},
        "evaluate": {"arms": ["written", "windows", "oracle"], "max_new_tokens": 3, "resamples": 20},
        "decide": {"resamples": 20},
    }
    return Params.model_validate({name: {**content.get(name, {}), **sections.get(name, {})} for name in content})
