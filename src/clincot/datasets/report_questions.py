"""Turns a data set with reports.jsonl into one with report questions: one question per report, the report its answer.

A report question passes through the same loop as any other: regions, one report per region, judges, pairs. A report on
several images is asked about all of them, side by side in one picture (joined_views.py), or about the first. Its
reference has the boxes that the source
folder's answer key has for that image, because the oracle arm and the hit-rate need boxes. An image without boxes in
the key gets none.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from clincot.datasets.folder import QUESTIONS, REFERENCES, StudyIndex, load_questions, load_references
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
from clincot.datasets.ingest.writer import FolderWriter, SourceImage, SourceQuestion, open_dataset_folder
from clincot.datasets.joined_views import join_views
from clincot.datasets.reports import REPORTS_FILE, ReportRow, read_numbered_reports
from clincot.geometry import Box
from clincot.images import InvalidImage
from clincot.jsonl import InvalidRecord

DEFAULT_QUESTION = "Describe the findings."
REPORT_TOPIC = "report"
Views = Literal["all", "first"]
_BATCH_SIZE = 512  # reports read at a time, so that their images can be decoded in parallel


@dataclass(frozen=True)
class _ReportSource:
    """What questions are made from. `joined`: where pictures of several views are written until they are stored."""

    studies: StudyIndex
    boxes: dict[str, tuple[Box, ...]]  # {study: its boxes}
    question: str
    views: Views
    joined: Path

    def choose_studies(self, row: ReportRow) -> Sequence[str]:
        """The studies that are shown. A row on one image names it in `study` alone."""
        return row.studies if self.views == "all" and row.studies else (row.study,)


def make_report_questions(
    source: Path,
    out: Path,
    *,
    question: str = DEFAULT_QUESTION,
    views: Views = "all",
    allow_refused: int = 0,
    workers: int | None = None,
) -> IngestReport:
    """Write a data set of report questions to `out`; images of single views are hard-linked where that is possible.

    `source`: a dataset folder with reports.jsonl. The reports are also written to `out`; those of a training set are
    the vocabulary of the r2gen protocol. `views`: the images of a report that are shown. A report without text, or on a
    study that is not in the folder, is refused.

    Raises TooManyRefused if more reports are refused than `allow_refused`; the others have been written by then. Raises
    InvalidRecord if reports.jsonl has an invalid line or no usable report, or if `out` is `source`.
    """
    if out.resolve() == source.resolve():
        raise InvalidRecord(f"{out}: report questions need a folder of their own, not the source folder")
    check_output_folder(out, source)
    path, tally, notes = source / REPORTS_FILE, IngestTally(allow_refused), Counter[str]()
    rows = iter(tqdm(read_numbered_reports(path), desc=f"reports of {source.name}", unit=" reports", disable=None))
    with (
        tempfile.TemporaryDirectory(prefix="clincot-views-") as joined,
        IngestIndex() as index,
        WorkerPool(workers) as pool,
    ):
        reports = _ReportSource(StudyIndex(source), _collect_boxes(source), question, views, Path(joined))
        images = ImageInspector(index, pool)
        with open_dataset_folder(out, images, index, reports=True, link_images=True) as folder:
            while batch := list(islice(rows, _BATCH_SIZE)):
                singles = [row.study for _, row in batch if len(reports.choose_studies(row)) == 1]
                known = [study for study in singles if study in reports.studies]
                images.inspect_all(reports.studies.resolve_image_path(study) for study in known)
                for number, row in batch:
                    tally.take_row(
                        str(path), number, partial(_add_report_question, folder, row, number, reports, notes)
                    )
            if tally.kept == 0:
                raise tally.build_no_rows_error(path, "reports")
        left_out = len(reports.studies) - notes.pop(_SHOWN, 0)
        if left_out:
            notes["studies without a question, left out"] = left_out
        return write_report(
            out,
            tally,
            index,
            source=path,
            folders=[folder.count_records(".")],
            published=DatasetAttribution(licence=f"that of {source}"),
            notes=[f"{note}: {count}" for note, count in sorted(notes.items()) if count],
        )


_SHOWN = "studies shown"


def _add_report_question(
    folder: FolderWriter, row: ReportRow, number: int, reports: _ReportSource, notes: Counter[str]
) -> str | None:
    """Add the question and the report; returns and raises as `FolderWriter.add_question` does."""
    source_question = _build_source_question(row, number, reports)
    first = folder.add_question(source_question) or folder.add_report([source_question.picture], row.text)
    if first is None:
        shown = len(reports.choose_studies(row))
        notes[_SHOWN] += shown
        notes["questions with boxes" if source_question.boxes else "questions without boxes"] += 1
        notes["reports on several images, shown side by side"] += shown > 1
        notes["reports on several images, asked about the first"] += len(row.studies) > shown
    return first


def _build_source_question(row: ReportRow, number: int, reports: _ReportSource) -> SourceQuestion:
    chosen = reports.choose_studies(row)
    for name in chosen:
        if name not in reports.studies:
            raise InvalidRow(f"study {name!r} is not in {reports.studies.folder}. Use a study's id from studies.jsonl")
    if not row.text.strip():
        raise InvalidRow("the report is empty. Remove the row, or write its text")
    study = reports.studies[chosen[0]]
    image, boxes = _choose_picture(chosen, number, reports)
    return SourceQuestion(
        picture=SourceImage(
            location=f"row {number}",
            image=image,
            image_name=" + ".join(reports.studies[one].source_id or reports.studies[one].image for one in chosen),
            modality=study.modality,
            patient=study.patient,
            split=study.split,
        ),
        question=reports.question,
        answer=row.text.strip(),
        kind="report",
        boxes=boxes,
        topic=REPORT_TOPIC,
        source_id=study.id,
    )


def _choose_picture(chosen: Sequence[str], number: int, reports: _ReportSource) -> tuple[Path, tuple[Box, ...]]:
    """The file that is shown, and the key's boxes in it."""
    paths = [reports.studies.resolve_image_path(study) for study in chosen]
    boxes = [reports.boxes.get(study, ()) for study in chosen]
    if len(paths) == 1:
        return paths[0], boxes[0]
    joined = reports.joined / f"{number}.png"
    try:
        return joined, join_views(paths, boxes, joined)
    except InvalidImage as error:
        raise InvalidRow(f"image: {error}. Replace the file, or remove the row") from None


def _collect_boxes(source: Path) -> dict[str, tuple[Box, ...]]:
    """Return {study: the distinct boxes of its answers}; empty if the folder has no answer key."""
    if not ((source / QUESTIONS).is_file() and (source / REFERENCES).is_file()):
        return {}
    studies = {question.id: question.study for question in load_questions(source)}
    boxes: dict[str, dict[Box, None]] = {}  # a dict of boxes is an ordered set
    for reference in load_references(source):
        if reference.boxes and reference.question in studies:
            boxes.setdefault(studies[reference.question], {}).update(dict.fromkeys(reference.boxes))
    return {study: tuple(distinct) for study, distinct in boxes.items()}
