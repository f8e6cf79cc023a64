"""Report questions from a data set with reports.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.report import TooManyRefused
from clincot.datasets.report_questions import make_report_questions
from clincot.jsonl import BadRecord
from clincot.report_file import read_reports
from tests import tiny


def with_reports(folder: Path, texts: list[str], **more: str) -> Path:
    """The tiny data set with a report of each of its first studies."""
    tiny.write_set(folder, studies=4)
    rows = dict(zip(StudyIndex(folder), texts, strict=False)) | more
    (folder / "reports.jsonl").write_text("".join(json.dumps({"study": s, "text": t}) + "\n" for s, t in rows.items()))
    return folder


def test_one_question_a_report_with_the_boxes_that_the_key_knows(tmp_path: Path) -> None:
    source = with_reports(tmp_path / "source", ["A nodule on the left.", "Clear lungs. ", "Two\nlines."])
    made = make_report_questions(source, tmp_path / "out")
    assert (made.questions, made.studies_without_report, made.with_boxes, made.refused) == (3, 1, 3, ())
    questions, references = list(load_questions(tmp_path / "out")), list(load_references(tmp_path / "out"))
    assert {(q.text, q.kind, q.topic) for q in questions} == {("Describe the findings.", "report", "report")}
    assert [r.answer for r in references] == ["A nodule on the left.", "Clear lungs.", "Two\nlines."]
    studies = list(StudyIndex(source))[:3]
    assert [q.study for q in questions] == studies == list(StudyIndex(tmp_path / "out"))
    boxes = {q.id: q.study for q in load_questions(source)}
    known = {boxes[r.question]: r.boxes for r in load_references(source)}  # the same box for both questions of a film
    assert [r.boxes for r in references] == [known[study] for study in studies]
    assert [row.study for row in read_reports(tmp_path / "out" / "reports.jsonl")] == studies
    index = StudyIndex(tmp_path / "out")
    assert all(index.image_path(study).is_file() for study in index)


def test_without_an_answer_key_there_are_no_boxes(tmp_path: Path) -> None:
    source = with_reports(tmp_path / "source", ["Clear."] * 4)
    (source / "references.jsonl").unlink()
    made = make_report_questions(source, tmp_path / "out", question="Write a report.")
    assert (made.questions, made.with_boxes) == (4, 0)
    assert {q.text for q in load_questions(tmp_path / "out")} == {"Write a report."}


def test_bad_rows_are_refused_with_what_mends_them(tmp_path: Path) -> None:
    source = with_reports(tmp_path / "source", ["Clear.", " "], **{"study-0": "Of another set."})
    with pytest.raises(TooManyRefused) as refused:
        make_report_questions(source, tmp_path / "out")
    assert "reports.jsonl:2: the report is empty. Leave the row out" in str(refused.value)
    assert "reports.jsonl:3: study 'study-0' is not in" in str(refused.value)
    assert not (tmp_path / "out" / "questions.jsonl").exists()
    assert not (tmp_path / "out" / "reports.jsonl").exists()
    made = make_report_questions(source, tmp_path / "out", allow_refused=2)
    assert (made.questions, len(made.refused)) == (1, 2)


def test_the_source_is_not_written_over(tmp_path: Path) -> None:
    source = with_reports(tmp_path / "source", ["Clear."])
    with pytest.raises(BadRecord, match="need a folder of their own"):
        make_report_questions(source, source)
