"""Turns a data set with reports.jsonl into one with report questions: one question per report, the report its answer.

A report question passes through the same loop as any other: regions, one report per region, judges, pairs. It is asked
about the report's first image; further images of the report are left out. Its reference has the boxes that the source
folder's answer key has for that image, because the oracle arm and the hit-rate need boxes. An image without boxes in
the key gets none.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

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
from clincot.datasets.reports import REPORTS_FILE, ReportRow, read_numbered_reports
from clincot.geometry import Box
from clincot.jsonl import InvalidRecord

DEFAULT_QUESTION = "Describe the findings."
REPORT_TOPIC = "report"
_BATCH_SIZE = 512  # reports read at a time, so that their images can be decoded in parallel


def make_report_questions(
    source: Path, out: Path, *, question: str = DEFAULT_QUESTION, allow_refused: int = 0, workers: int | None = None
) -> IngestReport:
    """Write a data set of report questions to `out`; images are hard-linked where the file system can.

    `source`: a dataset folder with reports.jsonl. The reports are also written to `out`; those of a training set are
    the vocabulary of the r2gen protocol. A report without text, or on a study that is not in the folder, is
    refused.

    Raises TooManyRefused if more reports are refused than `allow_refused`; the others have been written by then. Raises
    InvalidRecord if reports.jsonl has an invalid line or no usable report, or if `out` is `source`.
    """
    if out.resolve() == source.resolve():
        raise InvalidRecord(f"{out}: report questions need a folder of their own, not the source folder")
    check_output_folder(out, source)
    path, tally, notes = source / REPORTS_FILE, IngestTally(allow_refused), Counter[str]()
    studies, boxes = StudyIndex(source), _collect_boxes(source)
    rows = iter(tqdm(read_numbered_reports(path), desc=f"reports of {source.name}", unit=" reports", disable=None))
    with IngestIndex() as index, WorkerPool(workers) as pool:
        images = ImageInspector(index, pool)
        with open_dataset_folder(out, images, index, reports=True, link_images=True) as folder:
            while batch := list(islice(rows, _BATCH_SIZE)):
                images.inspect_all(studies.resolve_image_path(row.study) for _, row in batch if row.study in studies)
                for number, row in batch:
                    study_boxes = boxes.get(row.study, ())
                    tally.take_row(
                        str(path),
                        number,
                        partial(_add_report_question, folder, row, number, studies, study_boxes, question, notes),
                    )
            if tally.kept == 0:
                raise tally.build_no_rows_error(path, "reports")
        notes["studies without a question, left out"] = len(studies) - tally.kept
        return write_report(
            out,
            tally,
            index,
            source=path,
            folders=[folder.count_records(".")],
            published=DatasetAttribution(licence=f"that of {source}"),
            notes=[f"{note}: {count}" for note, count in sorted(notes.items()) if count],
        )


def _add_report_question(
    folder: FolderWriter,
    row: ReportRow,
    number: int,
    studies: StudyIndex,
    boxes: tuple[Box, ...],
    question: str,
    notes: Counter[str],
) -> str | None:
    """Add the question and the report; returns and raises as `FolderWriter.add_question` does."""
    source_question = _build_source_question(row, number, studies, boxes, question)
    first = folder.add_question(source_question) or folder.add_report([source_question.picture], row.text)
    if first is None:
        notes["questions with boxes" if boxes else "questions without boxes"] += 1
        notes["reports on several images, asked about the first"] += len(row.studies) > 1
    return first


def _build_source_question(
    row: ReportRow, number: int, studies: StudyIndex, boxes: tuple[Box, ...], question: str
) -> SourceQuestion:
    if row.study not in studies:
        raise InvalidRow(f"study {row.study!r} is not in {studies.folder}. Use a study's id from studies.jsonl")
    if not row.text.strip():
        raise InvalidRow("the report is empty. Remove the row, or write its text")
    study = studies[row.study]
    return SourceQuestion(
        picture=SourceImage(
            location=f"row {number}",
            image=studies.resolve_image_path(row.study),
            image_name=study.source_id or study.image,
            modality=study.modality,
            patient=study.patient,
            split=study.split,
        ),
        question=question,
        answer=row.text.strip(),
        kind="report",
        boxes=boxes,
        topic=REPORT_TOPIC,
        source_id=study.id,
    )


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
