"""Ingest of VQA-RAD: the official JSON and its images, as published at osf.io/89kps.

    Lau, Gayen, Ben Abacha and Demner-Fushman: A dataset of clinically generated visual questions and answers
    about radiology images. Scientific Data 5:180251 (2018). CC0 1.0.

There are two splits. The official test set consists of the rows whose `phrase_type` starts with "test_". Nearly all of
its images also occur in training rows, so it does not measure how a model does on new images. The image-disjoint split
keeps together all rows that may be about one patient: rows with the same image name, the same image content, the same
`qid_linked_id` or the same MedPix case.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from clincot.datasets.ingest.image_pool import ImageInspector, WorkerPool
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import (
    DatasetAttribution,
    IngestReport,
    IngestTally,
    InvalidRow,
    write_report,
)
from clincot.datasets.ingest.output_folder import check_output_folder
from clincot.datasets.ingest.writer import (
    SourceImage,
    SourceQuestion,
    find_pairwise_leakage,
    open_dataset_folder,
    read_studies,
)
from clincot.datasets.splits import SplitSide, assign_split, check_test_share, group_connected
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord, format_validation_error

ATTRIBUTION = DatasetAttribution(
    licence="CC0 1.0 Universal",
    citation="Lau, J. J., Gayen, S., Ben Abacha, A., Demner-Fushman, D. A dataset of clinically generated visual"
    " questions and answers about radiology images. Scientific Data 5, 180251 (2018). https://osf.io/89kps",
)
Split = Literal["official", "image-disjoint"]

# The names in the archive and the names that OSF displays.
_QUESTION_FILES = ("VQA_RAD_Dataset_Public.json", "VQA_RAD Dataset Public.json")
_IMAGE_FOLDERS = ("images", "VQA_RAD Image Folder")
# Lau et al. 2018: "head axial single-slice CTs or MRIs, chest x-rays, and abdominal axial CTs".
_MODALITIES = {"CHEST": "chest x-ray", "ABD": "abdominal CT", "HEAD": "head CT or MR"}


def _strip_text(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


class VqaRadRow(BaseModel):
    """A row of the official JSON. Surrounding spaces are stripped, and numbers in text fields become text."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, coerce_numbers_to_str=True)

    qid: str
    phrase_type: Literal["freeform", "para", "test_freeform", "test_para"]
    qid_linked_id: str
    image_case_url: str
    image_name: str = Field(pattern=r"^[^/\\]+$")
    image_organ: Literal["HEAD", "CHEST", "ABD"]
    evaluation: str
    question: str = Field(min_length=1)
    question_rephrase: str = "NULL"  # missing from two rows
    question_relation: str
    question_frame: str
    question_type: str
    answer: str = Field(min_length=1)
    answer_type: Annotated[Literal["CLOSED", "OPEN"], BeforeValidator(_strip_text)]  # "CLOSED " in two rows

    @property
    def official_test(self) -> bool:
        return self.phrase_type.startswith("test_")


def ingest_vqa_rad(
    source: Path,
    out: Path,
    *,
    split: Split = "official",
    allow_refused: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
    workers: int | None = None,
) -> IngestReport:
    """Read the folder `source` into the dataset folders out/train and out/test.

    `test_share` (expected share of image groups in test) and `seed` (of the hash that assigns them) apply to the
    image-disjoint split only. An image that is in both folders is stored once, by hard link, if the file system can.

    Raises InvalidRecord if files are missing or a split stays empty, and TooManyRefused if more rows are refused than
    `allow_refused`; the other rows have been written by then.
    """
    if split not in ("official", "image-disjoint"):
        raise InvalidInput(f'split is "official" or "image-disjoint", got {split!r}')
    check_test_share(test_share)
    check_output_folder(out, source)
    questions, images = _find_one(source, _QUESTION_FILES, "file"), _find_one(source, _IMAGE_FOLDERS, "folder")
    raw, tally = _load_json(questions), IngestTally(allow_refused)
    rows = dict(_parse_rows(raw, questions.name, tally))
    with IngestIndex() as index, WorkerPool(workers) as pool:
        pictures = ImageInspector(index, pool)
        pictures.inspect_all((images / row.image_name for row in rows.values()), label="VQA-RAD images")
        groups = _group_images(list(rows.values()), images, pictures)
        sides: dict[int, SplitSide] = {}
        for number, row in rows.items():
            if split == "official":
                sides[number] = "test" if row.official_test else "train"
            else:
                group = groups[row.image_name]
                sides[number] = assign_split(group, salt="vqa-rad", seed=seed, test_share=test_share)
        with (
            open_dataset_folder(out / "test", pictures, index) as test,
            open_dataset_folder(out / "train", pictures, index, shared_with=test) as train,
        ):
            folders = {"test": test, "train": train}
            # Test rows first: a row that is in both splits stays in test and is dropped from train, which gives the
            # published counts (1793 + 451 of 1797 + 451 rows).
            for number in sorted(rows, key=lambda n: (sides[n] != "test", n)):
                row, side = rows[number], sides[number]
                question = _build_source_question(number, row, images, patient=groups[row.image_name], split=side)
                tally.take_row(questions.name, number, partial(folders[side].add_question, question))
            for folder in (train, test):
                if folder.kinds.total() == 0:
                    raise tally.build_no_rows_error(questions, f"rows for {folder.folder.name} ({split} split)")
            test.flush()  # train is renamed first; by then both should be on disk
        return write_report(
            out,
            tally,
            index,
            source=source,
            split=split,
            published=ATTRIBUTION,
            folders=(train.count_records("train"), test.count_records("test")),
            leaks=find_pairwise_leakage({name: partial(read_studies, out / name) for name in ("train", "test")}, index),
            notes=tuple(_list_notes(raw, rows.values(), images)),
        )


def _find_one(source: Path, names: tuple[str, ...], what: str) -> Path:
    """Return the first of the names that exists in `source`; raises InvalidRecord if none does."""
    for name in names:
        if (source / name).exists():
            return source / name
    raise InvalidRecord(
        f"{source}: expected it to contain the {what} {' or '.join(map(repr, names))}; download it from osf.io/89kps"
    )


def _load_json(path: Path) -> list[object]:
    try:
        raw = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord(
            f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); download it again"
        ) from None
    if not isinstance(raw, list) or not raw:
        raise InvalidRecord(f"{path}: expected a list of questions, got {type(raw).__name__} {str(raw)[:80]!r}")
    return raw


def _parse_rows(raw: list[object], file: str, tally: IngestTally) -> Iterator[tuple[int, VqaRadRow]]:
    first = dict[str, int]()
    for number, fields in enumerate(raw, start=1):
        try:
            row = VqaRadRow.model_validate(fields)
        except ValidationError as error:
            tally.refuse_row(
                file, number, f"{format_validation_error(error)}. The fields are {', '.join(VqaRadRow.model_fields)}"
            )
            continue
        if first.setdefault(row.qid, number) != number:
            reason = f"qid: duplicate id {row.qid!r}, first at row {first[row.qid]}. Give every row its own id"
            tally.refuse_row(file, number, reason)
            continue
        yield number, row


def _group_images(rows: Sequence[VqaRadRow], images: Path, pictures: ImageInspector) -> dict[str, str]:
    """Return {image name: group}; images of a group may be of one patient. A group is named after its first image."""
    bonds = list[tuple[str, str]]()
    names = sorted({row.image_name for row in rows})
    for row in rows:
        for key in (f"linked {row.qid_linked_id}", f"case {row.image_case_url}"):
            if not key.endswith((" NULL", " ")):
                bonds.append((key, f"image {row.image_name}"))
    for name in names:
        # A missing or broken image has no content to compare; its rows are refused when they are added.
        with contextlib.suppress(InvalidRow):
            bonds.append((f"bytes {pictures.read_facts(images / name).sha256}", f"image {name}"))
    first = group_connected(bonds, [f"image {name}" for name in names])
    return {name: f"vqa-rad-{Path(first[f'image {name}'].removeprefix('image ')).stem}" for name in names}


def _build_source_question(number: int, row: VqaRadRow, images: Path, *, patient: str, split: str) -> SourceQuestion:
    return SourceQuestion(
        picture=SourceImage(
            location=f"row {number}",
            image=images / row.image_name,
            image_name=row.image_name,
            modality=_MODALITIES[row.image_organ],
            patient=patient,
            split=split,
        ),
        question=row.question,
        answer=row.answer,
        kind="closed" if row.answer_type == "CLOSED" else "open",
        topic=row.question_type.upper(),
        source_id=row.qid,
    )


def _list_notes(raw: list[object], rows: Iterable[VqaRadRow], images: Path) -> Iterator[str]:
    """Describe what was corrected and which images no question uses, with counts."""
    objects = [fields for fields in raw if isinstance(fields, dict)]
    used = {row.image_name for row in rows}
    counts = {
        "answer types with surrounding spaces, stripped": sum(
            str(fields.get("answer_type")) != str(fields.get("answer_type")).strip() for fields in objects
        ),
        "answers that were numbers, converted to text": sum(
            isinstance(fields.get("answer"), int | float) for fields in objects
        ),
        "rows without question_rephrase, read as NULL": sum("question_rephrase" not in fields for fields in objects),
        "rows with a character lost in the source (U+FFFD), kept unchanged": sum(
            "\ufffd" in f"{fields.get('question')}{fields.get('answer')}" for fields in objects
        ),
        "images without a question, left out": sum(path.name not in used for path in images.iterdir()),
    }
    return (f"{note}: {count}" for note, count in counts.items() if count)
