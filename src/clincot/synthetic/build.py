"""The controlled benchmark: radiographs rendered from one real CT, with exact answers and boxes.

One anatomy, warped and edited: a test of whether a model looks where the answer is. It is no clinical evidence.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from clincot.datasets.folder import IMAGES, QUESTIONS, REFERENCES, STUDIES
from clincot.datasets.reports import REPORTS_FILE, format_report_line
from clincot.errors import InvalidInput
from clincot.jsonl import atomic_write
from clincot.records import Question, Reference, Study
from clincot.synthetic.question_templates import (
    describe_radiograph,
)
from clincot.synthetic.rendering import (
    RENDERER_VERSION,
    Radiograph,
)
from clincot.synthetic.scenes import (
    ANY_COMPOSITION,
    Composition,
    stream_examples,
)


def build_synthetic_dataset(
    out_dir: Path,
    *,
    warp_seeds: Sequence[int],
    images: int,
    questions_per_image: int,
    seed: int,
    split: str,
    composition: Composition = ANY_COMPOSITION,
    cache_dir: Path | None = None,
) -> dict[str, int]:
    """Write a dataset folder (studies, questions, references, reports, images/) and return how many of each.

    Everything is written beside `out_dir` and renamed at the end. Raises FileExistsError where `out_dir` holds
    something already. `reports.jsonl` has one {"study", "text"} a line.
    """
    if images < 1 or questions_per_image < 1:
        raise InvalidInput(f"expected at least 1 image and 1 question an image, got {images} and {questions_per_image}")
    if out_dir.exists() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} is not empty; remove it or choose another folder")
    aside = out_dir.with_name(f"{out_dir.name}.{os.getpid()}.partial")
    (aside / IMAGES).mkdir(parents=True)
    try:
        made = stream_examples(
            warp_seeds, images, seed, cache_dir, questions_per_image=questions_per_image, composition=composition
        )
        counts = {"studies": 0, "questions": 0}
        with ExitStack() as stack:
            names = (STUDIES, QUESTIONS, REFERENCES, REPORTS_FILE)
            files = {name: stack.enter_context(atomic_write(aside / name)) for name in names}
            for index, (radiograph, asked) in enumerate(
                tqdm(made, total=images, desc=f"radiographs ({split})", mininterval=5, disable=None)
            ):
                study = _write_study(radiograph, aside, split, index)
                files[STUDIES].write(study.model_dump_json() + "\n")
                for one in asked:
                    question = Question(study=study.id, text=one.text, kind=one.kind, topic=one.topic)
                    reference = Reference(question=question.id, answer=one.answer, boxes=one.boxes, finding=one.finding)
                    files[QUESTIONS].write(question.model_dump_json() + "\n")
                    files[REFERENCES].write(reference.model_dump_json() + "\n")
                text = describe_radiograph(radiograph, np.random.default_rng([seed, RENDERER_VERSION, index, 4]))
                files[REPORTS_FILE].write(format_report_line([study.id], text))
                counts["studies"] += 1
                counts["questions"] += len(asked)
        if out_dir.exists():
            out_dir.rmdir()
        aside.rename(out_dir)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return counts


def _write_study(radiograph: Radiograph, folder: Path, split: str, index: int) -> Study:
    """Write the image and describe it. The patient is the warp."""
    buffer = io.BytesIO()
    Image.fromarray(radiograph.pixels).save(buffer, format="PNG", optimize=False, compress_level=6)
    content = buffer.getvalue()
    name = f"{IMAGES}/{index:06d}.png"
    (folder / name).write_bytes(content)
    height, width = radiograph.pixels.shape
    return Study(
        image=name,
        sha256=hashlib.sha256(content).hexdigest(),
        width=width,
        height=height,
        modality="rendered radiograph",
        patient=f"warp-{radiograph.warp_seed}",
        split=split,
        source_id=f"{split}-{index}",
    )
