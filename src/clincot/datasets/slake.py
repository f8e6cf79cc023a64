"""Ingest of SLAKE in its official layout: train.json, validate.json, test.json, mask.txt and imgs/xmlabN/.

The layout of the Hub is read too (validation.json, imgs.zip), and so is a ZIP archive of either.

    Liu, Zhan, Xu, Ma, Yang and Wu: SLAKE: A semantically-labeled knowledge-enhanced dataset for medical visual
    question answering. ISBI 2021, arXiv 2102.09542. CC BY 4.0. https://www.med-vqa.com/slake/

Questions are in English or Chinese; an ingest reads one of the two languages. Boxes come from detection.json and are
checked against mask.png (slake_boxes.py). The official split shares no image between its parts, but slices of one scan
may be in several parts, so the report counts near duplicates. The image-disjoint split keeps near duplicates together.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from tqdm import tqdm

from clincot.datasets.ingest.archives import unpack_release
from clincot.datasets.ingest.image_pool import ImageInspector, WorkerPool
from clincot.datasets.ingest.index import ImageFacts, IngestIndex
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
from clincot.datasets.near_duplicates import find_near_pairs
from clincot.datasets.slake_boxes import (
    MIN_MASK_IOU,
    BoxFormat,
    ImageDetections,
    find_answer_boxes,
    normalize_box,
    read_detections,
    read_mask_values,
    strip_label_side,
)
from clincot.datasets.splits import assign_split, check_test_share, group_connected
from clincot.errors import InvalidInput
from clincot.geometry import Box, RegionMask
from clincot.jsonl import InvalidRecord, format_validation_error

ATTRIBUTION = DatasetAttribution(
    licence="CC BY 4.0",
    citation="Liu, B., Zhan, L.-M., Xu, L., Ma, L., Yang, Y., Wu, X.-M. SLAKE: A semantically-labeled"
    " knowledge-enhanced dataset for medical visual question answering. ISBI 2021. https://www.med-vqa.com/slake/",
)
PARTS = ("train", "validate", "test")
_QUESTION_FILES = "train.json, validate.json, test.json"
PUBLISHED_ROWS = {"en": {"train": 4919, "validate": 1053, "test": 1061}}
Split = Literal["official", "image-disjoint"]
Language = Literal["en", "zh"]

_MODALITIES = {"X-RAY": "x-ray", "CT": "CT", "MRI": "MR"}


def _strip_text(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


class SlakeRow(BaseModel):
    """A row of the official JSON. Surrounding spaces are stripped, and numbers in text fields become text."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, coerce_numbers_to_str=True)

    img_id: int
    img_name: str = Field(pattern=r"^[A-Za-z0-9]\w*/\w[\w.]*$")  # "xmlab102/source.jpg"
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    q_lang: Language
    location: str
    modality: str
    answer_type: Annotated[Literal["OPEN", "CLOSED"], BeforeValidator(_strip_text)]
    base_type: str
    content_type: str
    triple: tuple[str, ...]
    qid: int


@dataclass(frozen=True)
class _RowPosition:
    """Position of a row in the release, shown as "train.json:3"."""

    part: str
    number: int  # from 1

    @property
    def file(self) -> str:
        return f"{self.part}.json"

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


def ingest_slake(  # noqa: PLR0913 (one keyword per command-line option)
    source: Path,
    out: Path,
    *,
    language: Language = "en",
    split: Split = "official",
    box_format: BoxFormat = "xywh",
    allow_refused: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
    workers: int | None = None,
) -> IngestReport:
    """Read the folder `source` into out/train, out/validate and out/test, or for image-disjoint into train and test.

    `box_format`: meaning of the four numbers in detection.json. `test_share` (expected share of image groups in test)
    and `seed` (of the hash that assigns them) apply to the image-disjoint split only.

    Raises InvalidRecord if a file is missing, a part stays empty, or the boxes contradict the masks; TooManyRefused if
    more rows are refused than `allow_refused`; the other rows have been written by then.
    """
    if split not in ("official", "image-disjoint"):
        raise InvalidInput(f'split is "official" or "image-disjoint", got {split!r}')
    check_test_share(test_share)
    check_output_folder(out, source)
    plan = _SlakePlan(language, split, box_format, allow_refused, test_share, seed, workers)
    with unpack_release(source, out.parent) as folder:
        return _ingest_folder(folder, source, out, plan)


@dataclass(frozen=True)
class _SlakePlan:
    """The keyword arguments of `ingest_slake`."""

    language: Language
    split: Split
    box_format: BoxFormat
    allow_refused: int
    test_share: float
    seed: int
    workers: int | None


def _ingest_folder(source: Path, shown: Path, out: Path, plan: _SlakePlan) -> IngestReport:
    """Read an unpacked release; `shown` is how the report calls it."""
    language, split, box_format, seed, test_share = (
        plan.language,
        plan.split,
        plan.box_format,
        plan.seed,
        plan.test_share,
    )
    tally, notes = IngestTally(plan.allow_refused), Counter[str]()
    rows = dict(_read_rows(source, language, tally, notes))
    names = list(dict.fromkeys(row.img_name for row in rows.values()))
    with IngestIndex() as index, WorkerPool(plan.workers) as pool:
        images = ImageInspector(index, pool)
        images.inspect_all((source / "imgs" / name for name in names), label="SLAKE images")
        detections = _read_all_detections(source, names, pool)
        _check_box_format(source, detections, box_format)
        facts = dict(_collect_facts(source, names, images))
        boxes: dict[str, tuple[tuple[str, Box], ...]] = {}
        masks: dict[str, dict[Box, RegionMask]] = {}
        for name, of_image in facts.items():
            boxes[name], masks[name] = _convert_boxes(detections[name], of_image, box_format, notes)
        labels = _collect_labels(detections.values())
        groups = _group_images(names, facts, join_near_duplicates=split == "image-disjoint")
        parts = PARTS if split == "official" else ("train", "test")
        with contextlib.ExitStack() as stack:
            folders = {
                part: stack.enter_context(open_dataset_folder(out / part, images, index)) for part in reversed(parts)
            }
            # Test rows first: a row that is in two parts stays in test.
            for position, row in sorted(rows.items(), key=lambda pair: (-PARTS.index(pair[0].part), pair[0].number)):
                part = position.part
                if split == "image-disjoint":
                    part = assign_split(groups[row.img_name], salt="slake", seed=seed, test_share=test_share)

                def add(position: _RowPosition = position, row: SlakeRow = row, part: str = part) -> str | None:
                    if detections[row.img_name].refused:
                        raise InvalidRow(detections[row.img_name].refused)
                    image_boxes = boxes.get(row.img_name, ())
                    finding, answer_boxes = find_answer_boxes(row.question, row.answer, image_boxes, labels)
                    notes["questions with boxes" if answer_boxes else "questions without boxes"] += 1
                    picture = _build_source_image(position, row, source, part, group=groups[row.img_name])
                    asked = _build_source_question(position, row, picture, finding, answer_boxes)
                    answer_masks = tuple(masks.get(row.img_name, {}).get(box) for box in answer_boxes)
                    if any(answer_masks):
                        notes["questions with a mask"] += 1
                        asked = replace(asked, masks=answer_masks)
                    return folders[part].add_question(asked)

                tally.take_row(position.file, position.number, add)
            for part, folder in folders.items():
                if folder.kinds.total() == 0:
                    raise tally.build_no_rows_error(source, f"rows in {language!r} for {part} ({split} split)")
                folder.flush()
        return write_report(
            out,
            tally,
            index,
            source=shown,
            split=split,
            published=ATTRIBUTION,
            folders=[folders[part].count_records(part) for part in parts],
            leaks=find_pairwise_leakage({part: partial(read_studies, out / part) for part in parts}, index),
            notes=[
                *(f"{note}: {count}" for note, count in sorted(notes.items())),
                *_list_count_differences(rows, language),
            ],
        )


def _read_rows(
    source: Path, language: Language, tally: IngestTally, notes: Counter[str]
) -> Iterator[tuple[_RowPosition, SlakeRow]]:
    if not (source / "imgs").is_dir():
        raise InvalidRecord(
            f"{source}: expected it to contain the folder 'imgs' and the files {_QUESTION_FILES};"
            " download SLAKE from https://www.med-vqa.com/slake/ and name the folder that it unpacks to"
        )
    for part in PARTS:
        file = source / f"{part}.json"
        on_the_hub = source / "validation.json"  # BoKelvin/SLAKE
        if part == "validate" and not file.exists() and on_the_hub.exists():
            file = on_the_hub
        for number, fields in enumerate(_load_json(file), start=1):
            position = _RowPosition(part, number)
            try:
                row = SlakeRow.model_validate(fields)
            except ValidationError as error:
                remedy = f"The fields are {', '.join(SlakeRow.model_fields)}; download the file again or fix the row"
                tally.refuse_row(position.file, number, f"{format_validation_error(error)}. {remedy}")
                continue
            if row.q_lang == language:
                yield position, row
            else:
                notes[f"questions in the other language ({row.q_lang}), left out"] += 1


def _load_json(path: Path) -> list[object]:
    try:
        raw = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InvalidRecord(f"{path}: file not found; SLAKE has {_QUESTION_FILES}") from None
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); download it again") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord(
            f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); download it again"
        ) from None
    if not isinstance(raw, list) or not raw:
        raise InvalidRecord(f"{path}: expected a list of questions, got {type(raw).__name__} {str(raw)[:80]!r}")
    return raw


def _read_all_detections(source: Path, names: Sequence[str], pool: WorkerPool) -> dict[str, ImageDetections]:
    read = partial(read_detections, values=read_mask_values(source / "mask.txt"))
    folders = [(source / "imgs" / name).parent for name in names]
    progress = tqdm(pool.run_jobs(read, folders), total=len(folders), desc="SLAKE boxes", unit="image", disable=None)
    return dict(zip(names, progress, strict=True))


def _collect_labels(detections: Iterable[ImageDetections]) -> set[str]:
    """All labels of the release, without their side."""
    labels = set[str]()
    for image in detections:
        labels.update(strip_label_side(label) for label, _ in image.boxes)
    return labels


def _check_box_format(source: Path, detections: dict[str, ImageDetections], box_format: BoxFormat) -> None:
    """Raise InvalidRecord if the masks contradict `box_format`.

    They do if more boxes agree with the masks when read in the other format, or if fewer than a tenth agree. The tenth
    is low because hand-drawn boxes may be loose and lesions may have no mask of their own.
    """
    checked = sum(image.checked for image in detections.values())
    fits = {
        "xywh": sum(image.as_xywh for image in detections.values()),
        "xyxy": sum(image.as_xyxy for image in detections.values()),
    }
    other: BoxFormat = "xyxy" if box_format == "xywh" else "xywh"
    if checked and (fits[box_format] * 10 < checked or fits[other] > fits[box_format]):
        raise InvalidRecord(
            f"{source}/imgs: {checked} boxes of detection.json can be compared with mask.png. Read as {box_format},"
            f" {fits[box_format]} agree with it (IoU at least {MIN_MASK_IOU}); read as {other}, {fits[other]} agree. If"
            f" the second number is higher, pass --box-format {other}. If both are low, the masks do not belong to"
            " these images: download imgs again"
        )


def _collect_facts(source: Path, names: Sequence[str], images: ImageInspector) -> Iterator[tuple[str, ImageFacts]]:
    for name in names:
        with contextlib.suppress(InvalidRow):  # its rows are refused, with the reason, when they are added
            yield name, images.read_facts(source / "imgs" / name)


def _convert_boxes(
    detections: ImageDetections, facts: ImageFacts, box_format: BoxFormat, notes: Counter[str]
) -> tuple[tuple[tuple[str, Box], ...], dict[Box, RegionMask]]:
    """Normalise an image's boxes, as (label, box), with the masks of those that have one.

    `notes` count how boxes agree with the mask.
    """
    boxes = []
    masks = {}
    of_boxes = detections.masks.get(box_format, (None,) * len(detections.boxes))
    for (label, numbers), mask in zip(detections.boxes, of_boxes, strict=True):
        box = normalize_box(numbers, box_format, width=facts.width, height=facts.height)
        if box is None:
            notes["boxes outside their image, left out"] += 1
        else:
            boxes.append((label, box))
            if mask is not None:
                masks[box] = mask
    notes["boxes in detection.json"] += len(detections.boxes)
    notes[f"boxes that mask.png confirms (IoU at least {MIN_MASK_IOU})"] += (
        detections.as_xywh if box_format == "xywh" else detections.as_xyxy
    )
    notes["boxes that could not be compared with mask.png"] += len(detections.boxes) - detections.checked
    if not detections.boxes and not detections.refused:
        notes["images without boxes"] += 1
    return tuple(boxes), masks


def _group_images(names: Sequence[str], facts: dict[str, ImageFacts], *, join_near_duplicates: bool) -> dict[str, str]:
    """Return {image: first image of its group}; a group has equal images and, on request, near duplicates."""
    known = [name for name in names if name in facts]
    bonds = [(name, facts[name].sha256) for name in known]
    if join_near_duplicates:
        pairs = find_near_pairs([facts[name].near for name in known])
        bonds += [(known[pair.first], known[pair.second]) for pair in pairs]
    return group_connected(bonds, list(names))


def _build_source_image(position: _RowPosition, row: SlakeRow, source: Path, part: str, *, group: str) -> SourceImage:
    return SourceImage(
        location=str(position),
        image=source / "imgs" / row.img_name,
        image_name=row.img_name,
        modality=_MODALITIES.get(row.modality.upper(), row.modality),
        patient=f"slake-{group.partition('/')[0]}",  # SLAKE does not publish which scans are of one patient
        split=part,
    )


def _build_source_question(
    position: _RowPosition, row: SlakeRow, picture: SourceImage, finding: str, boxes: tuple[Box, ...]
) -> SourceQuestion:
    return SourceQuestion(
        picture=picture,
        question=row.question,
        answer=row.answer,
        kind="closed" if row.answer_type == "CLOSED" else "open",
        boxes=boxes,
        topic=row.content_type,
        finding=finding,
        source_id=f"{position.part}:{row.qid}",
    )


def _list_count_differences(rows: dict[_RowPosition, SlakeRow], language: Language) -> list[str]:
    """Describe the parts whose number of questions differs from the published number."""
    counts = Counter(position.part for position in rows)
    return [
        f"{part}.json has {counts[part]} questions in {language!r}; the published release has {published}"
        for part, published in PUBLISHED_ROWS.get(language, {}).items()
        if counts[part] != published
    ]
