"""A data set of report questions from a data set with reports.jsonl: one question a study, its report the answer.

The question goes through the same loop as any other: regions, one report a region, judges, pairs. Its reference's boxes
are those that the folder's own answer key gives for the study, so that the oracle and the hit-rate have something to go
by; a study whose key has none has none.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from clincot.datasets.folder import QUESTIONS, REFERENCES, StudyIndex, load_questions, load_references
from clincot.datasets.report import Refusals, RefusedRow
from clincot.datasets.writing import Row, RowRefused, Seen, SourceImages, dataset_folder
from clincot.geometry import Box
from clincot.images import DEFAULT_LIMITS
from clincot.jsonl import BadRecord, written_aside
from clincot.report_file import REPORTS, ReportRow, read_reports

QUESTION = "Describe the findings."
TOPIC = "report"


class ReportQuestions(BaseModel):
    """What became of the rows of reports.jsonl."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    questions: int
    studies_without_report: int
    with_boxes: int
    refused: tuple[RefusedRow, ...]

    def summary(self) -> str:
        lines = [
            f"{self.questions} questions, one a report ({self.with_boxes} with boxes); "
            f"{self.studies_without_report} studies without; {len(self.refused)} rows refused",
            *map(str, self.refused),
        ]
        return "\n".join(lines)


def make_report_questions(
    source: Path, out: Path, *, question: str = QUESTION, allow_refused: int = 0
) -> ReportQuestions:  # fmt: skip
    """Write the data set of report questions; images are hard-linked where the file system can.

    `source` is a dataset folder with reports.jsonl, which is copied too: of a training set, it is the vocabulary of the
    r2gen protocol. A row without text or of a study that the folder does not have is refused; more than `allow_refused`
    raise TooManyRefused. Raises BadRecord where no row is left, or out is source.
    """
    if out.resolve() == source.resolve():
        raise BadRecord(f"{out}: the report questions need a folder of their own, not the one they are made from")
    studies, boxes = StudyIndex(source), _boxes(source)
    refusals, kept, boxed = Refusals(allow_refused), 0, 0
    path = source / REPORTS
    rows = tqdm(read_reports(path), desc=f"reports of {source.name}", unit=" reports", total=len(studies), disable=None)
    with (
        dataset_folder(out, SourceImages(DEFAULT_LIMITS), Seen(), link_images=True) as folder,
        written_aside(out / REPORTS) as reports,
    ):
        for number, row in enumerate(rows, start=1):
            try:
                first = folder.add(_row(row, number, studies, boxes.get(row.study, ()), question))
                if first is not None:
                    raise RowRefused(f"it repeats row {first}: the same image, the same report. Leave one out")
            except RowRefused as error:
                refusals.add(str(path), number, str(error))
                continue
            reports.write(json.dumps({"study": row.study, "text": row.text}, ensure_ascii=False) + "\n")
            kept += 1
            boxed += bool(boxes.get(row.study))
        refused = refusals.settle()
        if kept == 0:
            raise BadRecord(f"{path}: expected reports, but not one was kept")
    return ReportQuestions(
        questions=kept, studies_without_report=len(studies) - kept, with_boxes=boxed, refused=refused
    )


def _row(row: ReportRow, number: int, studies: StudyIndex, boxes: tuple[Box, ...], question: str) -> Row:
    if row.study not in studies:
        raise RowRefused(
            f"study {row.study!r} is not in {studies.folder}. Give the report's study as studies.jsonl has it"
        )
    if not row.text.strip():
        raise RowRefused("the report is empty. Leave the row out, or write its text")
    study = studies[row.study]
    return Row(
        number=number,
        image=studies.image_path(row.study),
        image_name=study.source_id or study.image,
        question=question,
        answer=row.text.strip(),
        kind="report",
        boxes=boxes,
        modality=study.modality,
        patient=study.patient,
        split=study.split,
        topic=TOPIC,
        finding="",
        source_id=study.id,
    )


def _boxes(source: Path) -> dict[str, tuple[Box, ...]]:
    """{study: the boxes that the folder's answer key has of it, each once}; none where there is no key."""
    if not ((source / QUESTIONS).is_file() and (source / REFERENCES).is_file()):
        return {}
    study_of = {question.id: question.study for question in load_questions(source)}
    found: dict[str, dict[Box, None]] = {}
    for reference in load_references(source):
        if reference.boxes and reference.question in study_of:
            found.setdefault(study_of[reference.question], {}).update(dict.fromkeys(reference.boxes))
    return {study: tuple(boxes) for study, boxes in found.items()}
