"""VQA-RAD for tests: the release beside the repository if it is there, else a small stand-in in its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clincot.datasets.vqa_rad import ingest_vqa_rad

RELEASE = Path(__file__).parents[3] / "shared" / "data" / "vqa-rad"
_QUESTIONS = (  # what the release asks most: presence, side, organ, modality, size, count
    ("Is there a pleural effusion?", "PRES", "CLOSED", ("Yes", "No")),
    ("Which side is the lesion on?", "POS", "OPEN", ("Left", "Right")),
    ("What organ system is shown?", "ORGAN", "OPEN", ("Chest", "Abdomen")),
    ("Is this a CT scan?", "MODALITY", "CLOSED ", ("no", "yes")),
    ("Is the heart enlarged?", "SIZE", "CLOSED", ("No", "Yes")),
    ("How many lesions are there?", "COUNT", "OPEN", (1, 2)),
)


def ingest_some(out: Path) -> Path:
    """Ingest the release or its stand-in with the image-disjoint split; returns the folder with train and test."""
    source = RELEASE if RELEASE.is_dir() else write_stand_in(out / "release")
    ingest_vqa_rad(source, out / "set", split="image-disjoint")
    return out / "set"


def write_stand_in(folder: Path, *, images: int = 40, side: int = 256) -> Path:
    """A release of `images` films with six questions each, in the fields and with the traps of the real one."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(images):
        pixels = rng.integers(10, 90, (side, side)).astype(np.uint8)
        left, top = rng.integers(8, side - 80, 2)
        pixels[top : top + 64, left : left + 64] = 230
        name = f"synpic{number:05d}.jpg"
        Image.fromarray(pixels).save(folder / "images" / name, quality=95)
        for text, kind, answer_type, answers in _QUESTIONS:
            rows.append(
                {
                    "qid": len(rows) + 1,
                    "phrase_type": "freeform",
                    "qid_linked_id": f"link-{len(rows) + 1}",
                    "image_case_url": f"https://medpix.nlm.nih.gov/case?id={number}",
                    "image_name": name,
                    "image_organ": ("CHEST", "ABD", "HEAD")[number % 3],
                    "evaluation": "not evaluated",
                    "question": text,
                    "question_rephrase": "NULL",
                    "question_relation": "NULL",
                    "question_frame": "NULL",
                    "question_type": kind,
                    "answer": answers[(number + len(rows)) % 2],
                    "answer_type": answer_type,
                }
            )
    (folder / "VQA_RAD_Dataset_Public.json").write_text(json.dumps(rows))
    return folder
