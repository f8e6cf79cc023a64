"""Writes data sets of radiographs that are rendered from one real CT, with exact answers and boxes.

They have one anatomy, warped and edited. They test whether a model looks where the answer is; results are not clinical
evidence.
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
from clincot.datasets.near_duplicates import IMAGE_HASHES, format_hash_line, hash_image
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


def build_synthetic_dataset(  # noqa: PLR0913 (one keyword per command-line option)
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
    """Write a dataset folder with reports, and return the numbers of studies and questions.

    `warp_seeds`: the patients. `split`: written to every study. `composition`: the combinations of findings that may
    occur. The data are written to a temporary folder that is renamed to `out_dir` at the end.

    Raises InvalidInput if a count is below 1, and FileExistsError if `out_dir` is not empty.
    """
    if images < 1 or questions_per_image < 1:
        raise InvalidInput(
            f"expected at least 1 image and 1 question per image, got {images} and {questions_per_image}"
        )
    if out_dir.exists() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} is not empty; remove it or choose another folder")
    partial = out_dir.with_name(f"{out_dir.name}.{os.getpid()}.partial")
    (partial / IMAGES).mkdir(parents=True)
    try:
        examples = stream_examples(
            warp_seeds, images, seed, cache_dir, questions_per_image=questions_per_image, composition=composition
        )
        counts = {"studies": 0, "questions": 0}
        with ExitStack() as stack:
            names = (STUDIES, QUESTIONS, REFERENCES, REPORTS_FILE, IMAGE_HASHES)
            files = {name: stack.enter_context(atomic_write(partial / name)) for name in names}
            for index, (radiograph, questions) in enumerate(
                tqdm(examples, total=images, desc=f"radiographs ({split})", mininterval=5, disable=None)
            ):
                study = _write_study(radiograph, partial, split, index)
                files[STUDIES].write(study.model_dump_json() + "\n")
                image_hash = hash_image(Image.fromarray(radiograph.pixels))
                files[IMAGE_HASHES].write(format_hash_line(study.sha256, image_hash))
                for templated in questions:
                    question = Question(study=study.id, text=templated.text, kind=templated.kind, topic=templated.topic)
                    reference = Reference(
                        question=question.id, answer=templated.answer, boxes=templated.boxes, finding=templated.finding
                    )
                    files[QUESTIONS].write(question.model_dump_json() + "\n")
                    files[REFERENCES].write(reference.model_dump_json() + "\n")
                text = describe_radiograph(radiograph, np.random.default_rng([seed, RENDERER_VERSION, index, 4]))
                files[REPORTS_FILE].write(format_report_line([study.id], text))
                counts["studies"] += 1
                counts["questions"] += len(questions)
        if out_dir.exists():
            out_dir.rmdir()
        partial.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


def _write_study(radiograph: Radiograph, folder: Path, split: str, index: int) -> Study:
    """Write the image and return its study, whose patient is the warp."""
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
