"""Ingest of SLAKE in its official layout: train.json, validate.json, test.json, mask.txt and imgs/xmlabN/.

    Liu, Zhan, Xu, Ma, Yang and Wu: SLAKE: A semantically-labeled knowledge-enhanced dataset for medical visual
    question answering. ISBI 2021, arXiv 2102.09542. CC BY 4.0. https://www.med-vqa.com/slake/

Questions are English or Chinese, one language an ingest. Boxes come from detection.json, held against mask.png
(slake_boxes.py). The official split shares no image between its parts, but slices of one scan may stand on both sides:
the report counts images that look alike. The image-disjoint split keeps those together as well.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from tqdm import tqdm

from clincot.datasets.ingest.image_pool import ImageInspector, WorkerPool
from clincot.datasets.ingest.index import ImageFacts, IngestIndex
from clincot.datasets.ingest.ingest_report import (
    DatasetAttribution,
    IngestReport,
    IngestTally,
    InvalidRow,
    write_report,
)
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
from clincot.geometry import Box
from clincot.jsonl import InvalidRecord, format_validation_error

ATTRIBUTION = DatasetAttribution(
    licence="CC BY 4.0",
    citation="Liu, B., Zhan, L.-M., Xu, L., Ma, L., Yang, Y., Wu, X.-M. SLAKE: A semantically-labeled"
    " knowledge-enhanced dataset for medical visual question answering. ISBI 2021. https://www.med-vqa.com/slake/",
)
PARTS = ("train", "validate", "test")
PUBLISHED_ROWS = {"en": {"train": 4919, "validate": 1053, "test": 1061}}
Split = Literal["official", "image-disjoint"]
Language = Literal["en", "zh"]

_MODALITIES = {"X-RAY": "x-ray", "CT": "CT", "MRI": "MR"}


def _strip_text(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


class SlakeRow(BaseModel):
    """A row of the official JSON. Outer spaces are cut off everywhere; whole numbers may stand where texts should."""

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
    """Where a row stands in the release."""

    part: str
    number: int  # from 1

    @property
    def file(self) -> str:
        return f"{self.part}.json"

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


def ingest_slake(
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
    """Read the folder `source` into out/train, out/validate and out/test (image-disjoint: train and test).

    Raises BadRecord where a file is missing or the boxes of detection.json, read as `box_format`, contradict the
    masks; TooManyRefused, when the others are in place, where more rows are bad than `allow_refused`.
    """
    if split not in ("official", "image-disjoint"):
        raise InvalidInput(f'split is "official" or "image-disjoint", got {split!r}')
    check_test_share(test_share)
    tally, notes = IngestTally(allow_refused), Counter[str]()
    rows = dict(_read_rows(source, language, tally, notes))
    names = list(dict.fromkeys(row.img_name for row in rows.values()))
    with IngestIndex() as ledger, WorkerPool(workers) as pool:
        images = ImageInspector(ledger, pool)
        images.inspect_all((source / "imgs" / name for name in names), label="SLAKE images")
        detections = _read_all_detections(source, names, pool)
        _check_box_format(source, detections, box_format)
        facts = dict(_collect_facts(source, names, images))
        boxes = {name: _convert_boxes(detections[name], facts[name], box_format, notes) for name in facts}
        bases = {strip_label_side(label) for found in detections.values() for label, _ in found.found}
        groups = _group_images(names, facts, alike=split == "image-disjoint")
        parts = PARTS if split == "official" else ("train", "test")
        with contextlib.ExitStack() as stack:
            folders = {
                part: stack.enter_context(open_dataset_folder(out / part, images, ledger)) for part in reversed(parts)
            }
            # The test rows first: a row that is in two parts is kept there.
            for place, row in sorted(rows.items(), key=lambda pair: (-PARTS.index(pair[0].part), pair[0].number)):
                part = place.part
                if split == "image-disjoint":
                    part = assign_split(groups[row.img_name], salt="slake", seed=seed, test_share=test_share)

                def add(place: _RowPosition = place, row: SlakeRow = row, part: str = part) -> str | None:
                    if detections[row.img_name].refused:
                        raise InvalidRow(detections[row.img_name].refused)
                    found = find_answer_boxes(row.question, row.answer, boxes.get(row.img_name, ()), bases)
                    notes["questions with boxes" if found[1] else "questions without boxes"] += 1
                    return folders[part].add_question(
                        _build_source_question(place, row, source, part, found, group=groups[row.img_name])
                    )

                tally.take_row(place.file, place.number, add)
            for part, folder in folders.items():
                if folder.kinds.total() == 0:
                    raise tally.build_no_rows_error(source, f"rows in {language!r} for {part} ({split} split)")
                folder.flush()
        return write_report(
            out,
            tally,
            ledger,
            source=source,
            split=split,
            published=ATTRIBUTION,
            folders=[folders[part].count_records(part) for part in parts],
            leaks=find_pairwise_leakage({part: partial(read_studies, out / part) for part in parts}, ledger),
            notes=[
                *(f"{what}: {count}" for what, count in sorted(notes.items())),
                *_list_count_differences(rows, language),
            ],
        )


def _read_rows(
    source: Path, language: Language, tally: IngestTally, notes: Counter[str]
) -> Iterator[tuple[_RowPosition, SlakeRow]]:
    if not (source / "imgs").is_dir():
        raise InvalidRecord(
            f"{source}: expected the folder 'imgs' in it, beside {', '.join(f'{part}.json' for part in PARTS)};"
            " get SLAKE from https://www.med-vqa.com/slake/ and give the folder it unpacks to"
        )
    for part in PARTS:
        for number, fields in enumerate(_load_json(source / f"{part}.json"), start=1):
            place = _RowPosition(part, number)
            try:
                row = SlakeRow.model_validate(fields)
            except ValidationError as error:
                fields_are = f"The fields are {', '.join(SlakeRow.model_fields)}; fetch the file again or mend the row"
                tally.refuse_row(place.file, number, f"{format_validation_error(error)}. {fields_are}")
                continue
            if row.q_lang == language:
                yield place, row
            else:
                notes[f"questions in the other language ({row.q_lang}), not taken"] += 1


def _load_json(path: Path) -> list[object]:
    try:
        raw = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InvalidRecord(
            f"{path}: there is no such file; SLAKE has {', '.join(f'{p}.json' for p in PARTS)}"
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); fetch it again") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord(
            f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); fetch it again"
        ) from None
    if not isinstance(raw, list) or not raw:
        raise InvalidRecord(f"{path}: expected a list of questions, got {type(raw).__name__} {str(raw)[:80]!r}")
    return raw


def _read_all_detections(source: Path, names: Sequence[str], pool: WorkerPool) -> dict[str, ImageDetections]:
    read = partial(read_detections, values=read_mask_values(source / "mask.txt"))
    folders = [(source / "imgs" / name).parent for name in names]
    workers = pool.start_pool(len(folders))
    found = map(read, folders) if workers is None else workers.map(read, folders, chunksize=4)
    shown = tqdm(found, total=len(folders), desc="SLAKE boxes", unit="image", disable=None)
    return dict(zip(names, shown, strict=True))


def _check_box_format(source: Path, detections: dict[str, ImageDetections], box_format: BoxFormat) -> None:
    """The masks decide: boxes that fit better when read the other way are not what they are said to be.

    A tenth has to agree at all: hand-drawn boxes may be loose, and lesions may have no mask of their own.
    """
    checked = sum(one.checked for one in detections.values())
    fits = {
        "xywh": sum(one.as_xywh for one in detections.values()),
        "xyxy": sum(one.as_xyxy for one in detections.values()),
    }
    other: BoxFormat = "xyxy" if box_format == "xywh" else "xywh"
    if checked and (fits[box_format] * 10 < checked or fits[other] > fits[box_format]):
        raise InvalidRecord(
            f"{source}/imgs: {checked} boxes of detection.json can be held against mask.png. Read as {box_format},"
            f" {fits[box_format]} agree with it (IoU at least {MIN_MASK_IOU}); read as {other}, {fits[other]}. If more agree"
            f" so, pass --box-format {other}; if neither fits, the masks are not those of these images: fetch imgs"
            " again"
        )


def _collect_facts(source: Path, names: Sequence[str], images: ImageInspector) -> Iterator[tuple[str, ImageFacts]]:
    for name in names:
        with contextlib.suppress(InvalidRow):  # the image's rows are refused with the reason when they are added
            yield name, images.read_facts(source / "imgs" / name)


def _convert_boxes(
    found: ImageDetections, facts: ImageFacts, box_format: BoxFormat, notes: Counter[str]
) -> tuple[tuple[str, Box], ...]:
    boxes = []
    for label, numbers in found.found:
        box = normalize_box(numbers, box_format, width=facts.width, height=facts.height)
        if box is None:
            notes["boxes outside their image, not taken"] += 1
        else:
            boxes.append((label, box))
    notes["boxes in detection.json"] += len(found.found)
    notes[f"boxes that mask.png confirms (IoU at least {MIN_MASK_IOU})"] += (
        found.as_xywh if box_format == "xywh" else found.as_xyxy
    )
    notes["boxes that mask.png could not be held against"] += len(found.found) - found.checked
    if not found.found and not found.refused:
        notes["images without boxes"] += 1
    return tuple(boxes)


def _group_images(names: Sequence[str], facts: dict[str, ImageFacts], *, alike: bool) -> dict[str, str]:
    """{image: the first image that it equals, or with `alike` looks like, through any chain}."""
    known = [name for name in names if name in facts]
    bonds = [(name, facts[name].sha256) for name in known]
    if alike:
        pairs = find_near_pairs([facts[name].near for name in known])
        bonds += [(known[pair.first], known[pair.second]) for pair in pairs]
    return group_connected(bonds, list(names))


def _build_source_question(
    place: _RowPosition, row: SlakeRow, source: Path, part: str, found: tuple[str, tuple[Box, ...]], *, group: str
) -> SourceQuestion:
    finding, where = found
    return SourceQuestion(
        picture=SourceImage(
            place=str(place),
            image=source / "imgs" / row.img_name,
            image_name=row.img_name,
            modality=_MODALITIES.get(row.modality.upper(), row.modality),
            patient=f"slake-{group.partition('/')[0]}",  # whose scans they are is not published
            split=part,
        ),
        question=row.question,
        answer=row.answer,
        kind="closed" if row.answer_type == "CLOSED" else "open",
        boxes=where,
        topic=row.content_type,
        finding=finding,
        source_id=f"{place.part}:{row.qid}",
    )


def _list_count_differences(rows: dict[_RowPosition, SlakeRow], language: Language) -> list[str]:
    """Where this release is not as large as the published one."""
    counts = Counter(place.part for place in rows)
    return [
        f"{part}.json has {counts[part]} questions in {language!r}; published are {published}"
        for part, published in PUBLISHED_ROWS.get(language, {}).items()
        if counts[part] != published
    ]
