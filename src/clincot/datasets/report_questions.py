"""A data set of report questions from a data set with reports.jsonl: one question a report, the report its answer.

The question goes through the same loop as any other: regions, one report a region, judges, pairs. It is asked about the
report's first image; the further images of a report on several are not taken over. Its reference's boxes are those that
the folder's own answer key gives for that image, so that the oracle and the hit-rate have something to go by; an image
whose key has none has none.
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
from clincot.datasets.ingest.writer import FolderWriter, SourceImage, SourceQuestion, open_dataset_folder
from clincot.datasets.reports import REPORTS_FILE, ReportRow, read_numbered_reports
from clincot.geometry import Box
from clincot.jsonl import InvalidRecord

DEFAULT_QUESTION = "Describe the findings."
REPORT_TOPIC = "report"
_BATCH_SIZE = 512  # reports read ahead, so that their images are decoded in parallel


def make_report_questions(
    source: Path, out: Path, *, question: str = DEFAULT_QUESTION, allow_refused: int = 0, workers: int | None = None
) -> IngestReport:
    """Write the data set of report questions; images are hard-linked where the file system can.

    `source` is a dataset folder with reports.jsonl. The reports that are asked for are written to `out` too: of a
    training set, they are the vocabulary of the r2gen protocol. A row without text or on a study that the folder does
    not have is refused; more than `allow_refused` raise TooManyRefused when the others are in place. Raises BadRecord
    where reports.jsonl has a line that is no report, where no row is left, or where out is source.
    """
    if out.resolve() == source.resolve():
        raise InvalidRecord(f"{out}: the report questions need a folder of their own, not the one they are made from")
    path, tally, notes = source / REPORTS_FILE, IngestTally(allow_refused), Counter[str]()
    studies, boxes = StudyIndex(source), _collect_boxes(source)
    rows = iter(tqdm(read_numbered_reports(path), desc=f"reports of {source.name}", unit=" reports", disable=None))
    with IngestIndex() as ledger, WorkerPool(workers) as pool:
        images = ImageInspector(ledger, pool)
        with open_dataset_folder(out, images, ledger, reports=True, link_images=True) as folder:
            while batch := list(islice(rows, _BATCH_SIZE)):
                images.inspect_all(studies.resolve_image_path(row.study) for _, row in batch if row.study in studies)
                for number, row in batch:
                    known = boxes.get(row.study, ())
                    tally.take_row(
                        str(path),
                        number,
                        partial(_add_report_question, folder, row, number, studies, known, question, notes),
                    )
            if tally.kept == 0:
                raise tally.build_no_rows_error(path, "reports")
        notes["studies that no question is about, not taken over"] = len(studies) - tally.kept
        return write_report(
            out,
            tally,
            ledger,
            source=path,
            folders=[folder.count_records(".")],
            published=DatasetAttribution(licence=f"that of {source}"),
            notes=[f"{what}: {count}" for what, count in sorted(notes.items()) if count],
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
    """The place of the row that this one repeats, None where it is new; raises RowRefused."""
    asked = _build_source_question(row, number, studies, boxes, question)
    first = folder.add_question(asked) or folder.add_report([asked.picture], row.text)
    if first is None:
        notes["questions with boxes" if boxes else "questions without boxes"] += 1
        notes["reports on several images, asked about the first"] += len(row.studies) > 1
    return first


def _build_source_question(
    row: ReportRow, number: int, studies: StudyIndex, boxes: tuple[Box, ...], question: str
) -> SourceQuestion:
    if row.study not in studies:
        raise InvalidRow(
            f"study {row.study!r} is not in {studies.folder}. Give the report's study as studies.jsonl has it"
        )
    if not row.text.strip():
        raise InvalidRow("the report is empty. Leave the row out, or write its text")
    study = studies[row.study]
    return SourceQuestion(
        picture=SourceImage(
            place=f"row {number}",
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
    """{study: the boxes that the folder's answer key has of it, each once}; none where there is no key."""
    if not ((source / QUESTIONS).is_file() and (source / REFERENCES).is_file()):
        return {}
    study_of = {question.id: question.study for question in load_questions(source)}
    found: dict[str, dict[Box, None]] = {}
    for reference in load_references(source):
        if reference.boxes and reference.question in study_of:
            found.setdefault(study_of[reference.question], {}).update(dict.fromkeys(reference.boxes))
    return {study: tuple(boxes) for study, boxes in found.items()}
