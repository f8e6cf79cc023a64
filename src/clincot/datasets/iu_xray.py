"""Ingest of IU X-Ray as R2Gen distributes it: annotation.json and images/CXRn_IM-n/{0,1}.png.

    Demner-Fushman et al.: Preparing a collection of radiology examinations for distribution and retrieval. JAMIA
    23(2), 2016. Splits: Chen, Song, Chang and Wan: Generating radiology reports via memory-driven transformer
    (R2Gen), EMNLP 2020: 2069 / 296 / 590 reports in train / val / test.

Every view becomes a study. The views of a report share a patient (in this collection a CXR number is one patient), and
the report is one line of reports.jsonl that names the studies of all its views. The collection has no questions;
`clincot report-questions` makes one per report.

De-identification replaced names, dates and text that looks like them with XXXX or longer runs of X. The placeholders
are kept by default, because published metrics are computed with them; `placeholders="drop"` removes them for training.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
from clincot.datasets.ingest.writer import SourceImage, find_pairwise_leakage, open_dataset_folder, read_studies
from clincot.datasets.splits import assign_split, check_test_share
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord, format_validation_error

ATTRIBUTION = DatasetAttribution(
    licence="CC BY-NC-ND 4.0 (Open-i, National Library of Medicine)",
    citation="Demner-Fushman, D. et al. Preparing a collection of radiology examinations for distribution and"
    " retrieval. JAMIA 23(2), 304-310 (2016). Splits: Chen, Z. et al. Generating radiology reports via memory-driven"
    " transformer. EMNLP 2020.",
)
PARTS = ("train", "val", "test")
PUBLISHED_REPORTS = {"train": 2069, "val": 296, "test": 590}
Split = Literal["official", "patient-disjoint"]
Placeholders = Literal["keep", "drop"]

_PLACEHOLDER_PATTERN = re.compile(r"\bX{4,}(?:'s)?\b", re.IGNORECASE)


class IuXrayEntry(BaseModel):
    """An entry of annotation.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    id: str = Field(pattern=r"^CXR\d+\S*$")  # "CXR2384_IM-0942"
    report: str = Field(min_length=1)
    image_path: tuple[str, ...] = Field(min_length=1)  # relative to images/
    split: Literal["train", "val", "test"]

    @property
    def patient(self) -> str:
        return "iu-" + self.id.partition("_")[0]


def ingest_iu_xray(  # noqa: PLR0913 (one keyword per command-line option)
    source: Path,
    out: Path,
    *,
    split: Split = "official",
    placeholders: Placeholders = "keep",
    allow_refused: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
    workers: int | None = None,
) -> IngestReport:
    """Read the folder `source` into out/train, out/val and out/test, or for patient-disjoint into train and test.

    A row in the ingest report is an entry of annotation.json with all of its views. `test_share` (expected share of
    patients in test) and `seed` (of the hash that assigns them) apply to the patient-disjoint split only.

    Raises InvalidRecord if annotation.json is missing or invalid or a part stays empty; TooManyRefused if more entries
    are refused than `allow_refused`; the others have been written by then.
    """
    if split not in ("official", "patient-disjoint"):
        raise InvalidInput(f'split is "official" or "patient-disjoint", got {split!r}')
    check_test_share(test_share)
    check_output_folder(out, source)
    path = source / "annotation.json"
    raw, tally, notes = _load_annotation(path), IngestTally(allow_refused), Counter[str]()
    entries = list(_parse_entries(raw, tally))
    parts = PARTS if split == "official" else ("train", "test")
    with IngestIndex() as index, WorkerPool(workers) as pool:
        images = ImageInspector(index, pool)
        view_names = chain.from_iterable(entry.image_path for _, entry in entries)
        images.inspect_all((source / "images" / name for name in view_names), label="IU X-Ray images")
        with contextlib.ExitStack() as stack:
            folders = {
                part: stack.enter_context(open_dataset_folder(out / part, images, index, reports=True))
                for part in reversed(parts)
            }
            for number, entry in entries:
                part: str = entry.split
                if split == "patient-disjoint":
                    part = assign_split(entry.patient, salt="iu-xray", seed=seed, test_share=test_share)
                pictures = _build_source_images(entry, number, source, part)

                def add(
                    entry: IuXrayEntry = entry, pictures: list[SourceImage] = pictures, part: str = part
                ) -> str | None:
                    text = _clean_report(entry.report, placeholders, notes)
                    first = folders[part].add_report(pictures, text)
                    notes[f"reports on {len(pictures)} views"] += first is None
                    return first

                tally.take_row(path.name, number, add)
            for part, folder in folders.items():
                if folder.reports == 0:
                    raise tally.build_no_rows_error(path, f"reports for {part} ({split} split)")
                folder.flush()
        return write_report(
            out,
            tally,
            index,
            source=source,
            split=split,
            published=ATTRIBUTION,
            folders=[folders[part].count_records(part) for part in parts],
            leaks=find_pairwise_leakage({part: partial(read_studies, out / part) for part in parts}, index),
            notes=[
                *(f"{note}: {count}" for note, count in sorted(notes.items()) if count),
                *_list_count_differences(raw),
            ],
        )


def _build_source_images(entry: IuXrayEntry, number: int, source: Path, part: str) -> list[SourceImage]:
    """Describe the views of an entry; `number` is the entry's row, `part` the folder that it goes to."""
    return [
        SourceImage(
            location=f"row {number}",
            image=source / "images" / name,
            image_name=name,
            modality="chest x-ray",
            patient=entry.patient,
            split=part,
        )
        for name in entry.image_path
    ]


def _load_annotation(path: Path) -> dict[str, list[object]]:
    try:
        raw = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InvalidRecord(
            f"{path}: file not found; expected R2Gen's folder iu_xray with annotation.json and images/"
            " (the README of github.com/zhjohnchan/R2Gen links to it)"
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); download it again") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord(
            f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); download it again"
        ) from None
    if not isinstance(raw, dict) or set(raw) != set(PARTS) or not all(isinstance(raw[part], list) for part in PARTS):
        raise InvalidRecord(f"{path}: expected an object with three lists, {', '.join(PARTS)}, got {str(raw)[:80]!r}")
    return raw


def _parse_entries(raw: dict[str, list[object]], tally: IngestTally) -> Iterator[tuple[int, IuXrayEntry]]:
    """Yield (number, entry) of the valid entries; numbers start at 1 and run through train, val and test."""
    number, first = 0, dict[str, int]()
    for part in PARTS:
        for fields in raw[part]:
            number += 1
            try:
                entry = IuXrayEntry.model_validate(fields)
            except ValidationError as error:
                reason = f"{format_validation_error(error)}. The fields are {', '.join(IuXrayEntry.model_fields)}"
                tally.refuse_row("annotation.json", number, f"{reason}; download the file again or fix the entry")
                continue
            if any(Path(name).is_absolute() or ".." in Path(name).parts for name in entry.image_path):
                reason = f"image_path: expected paths inside images/, got {list(entry.image_path)}. Fix the entry"
            elif entry.split != part:
                reason = f"split: {entry.split!r}, but the entry is in the list {part!r}. Make the two equal"
            elif first.setdefault(entry.id, number) != number:
                reason = f"id: duplicate id {entry.id!r}, first at row {first[entry.id]}. Keep one of the two"
            else:
                yield number, entry
                continue
            tally.refuse_row("annotation.json", number, reason)


def _clean_report(report: str, placeholders: Placeholders, notes: Counter[str]) -> str:
    """Remove the placeholders if asked to, and count them; raises InvalidRow if no word remains."""
    count = len(_PLACEHOLDER_PATTERN.findall(report))
    if not count:
        return report
    notes["reports with the placeholder XXXX"] += 1
    notes[f"placeholders XXXX {'kept' if placeholders == 'keep' else 'dropped'}"] += count
    if placeholders == "keep":
        return report
    text = _PLACEHOLDER_PATTERN.sub("", report)
    text = re.sub(r"\s+([.,;:])", r"\1", " ".join(text.split()))  # " ." -> "."
    text = re.sub(r"(?<=[.,;:])[.,;:]+|^[.,;:\s]+", "", text)  # sentences that were only placeholders
    if not re.search(r"\w", text):
        raise InvalidRow("report: it consists only of placeholders XXXX. Keep them, or remove the entry")
    return text


def _list_count_differences(raw: dict[str, list[object]]) -> list[str]:
    """Describe the parts whose number of entries differs from the published number."""
    return [
        f"{part} has {len(raw[part])} entries; the published release has {published}"
        for part, published in PUBLISHED_REPORTS.items()
        if len(raw[part]) != published
    ]
