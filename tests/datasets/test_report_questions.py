"""Report questions from a data set with reports.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clincot.cli.app import main
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.ingest.ingest_report import IngestReport, TooManyRefused
from clincot.datasets.report_questions import make_report_questions
from clincot.datasets.reports import ReportRow, format_report_line, read_reports
from clincot.images import open_image
from clincot.jsonl import InvalidRecord
from tests.support import tiny


def with_reports(folder: Path, texts: list[str], **more: str) -> Path:
    """The tiny data set with a report of each of its first studies."""
    tiny.write_set(folder, studies=4)
    rows = dict(zip(StudyIndex(folder), texts, strict=False)) | more
    (folder / "reports.jsonl").write_text("".join(json.dumps({"study": s, "text": t}) + "\n" for s, t in rows.items()))
    return folder


def test_one_question_a_report_with_the_boxes_that_the_key_knows(tmp_path: Path) -> None:
    source = with_reports(tmp_path / "source", ["A nodule on the left.", "Clear lungs. ", "Two\nlines."])
    made = make_report_questions(source, tmp_path / "out")
    assert (made.rows_read, made.rows_kept, made.rows_refused) == (3, 3, 0)
    assert made.notes == ("questions with boxes: 3", "studies without a question, left out: 1")
    assert "./: 3 questions (3 report) and 3 reports on 3 images" in made.format_summary()
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
    assert all(index.resolve_image_path(study).is_file() for study in index)


def test_without_an_answer_key_there_are_no_boxes(tmp_path: Path) -> None:
    source = with_reports(tmp_path / "source", ["Clear."] * 4)
    (source / "references.jsonl").unlink()
    made = make_report_questions(source, tmp_path / "out", question="Write a report.")
    assert made.notes == ("questions without boxes: 4",)
    assert {q.text for q in load_questions(tmp_path / "out")} == {"Write a report."}


def test_a_report_on_several_images_shows_them_side_by_side(tmp_path: Path) -> None:
    """Films of 96 x 128 and 160 x 100 pixels make one of 256 x 128; the second begins at 96 / 256 = .375."""
    source = tiny.write_set(tmp_path / "source", studies=3, shapes=((96, 128), (160, 100)))
    one, two, three = (studies := StudyIndex(source))
    text = format_report_line([one, two], "Clear.") + format_report_line([three], "A nodule.")
    (source / "reports.jsonl").write_text(text)
    made = make_report_questions(source, tmp_path / "out")
    assert "reports on several images, shown side by side: 1" in made.notes
    assert not any("left out" in note for note in made.notes)
    shown = StudyIndex(tmp_path / "out")
    (pair, alone) = (shown[question.study] for question in load_questions(tmp_path / "out"))
    assert alone.id == three
    assert (pair.width, pair.height, pair.patient) == (256, 128, studies[one].patient)
    picture = np.asarray(open_image(shown.resolve_image_path(pair.id)))
    views = [np.asarray(open_image(studies.resolve_image_path(study))) for study in (one, two)]
    assert (picture[:, :96] == views[0]).all()
    assert (picture[:100, 96:] == views[1]).all()
    assert not picture[100:, 96:].any()
    key = {question.id: question.study for question in load_questions(source)}
    boxes = {key[reference.question]: reference.boxes[0] for reference in load_references(source)}
    first, second = boxes[one], boxes[two]
    reference = next(load_references(tmp_path / "out"))
    left, right = reference.boxes
    assert left.xyxy == pytest.approx((first.x0 * 0.375, first.y0, first.x1 * 0.375, first.y1), abs=1e-4)
    moved = (0.375 + second.x0 * 0.625, second.y0 * 100 / 128, 0.375 + second.x1 * 0.625, second.y1 * 100 / 128)
    assert right.xyxy == pytest.approx(moved, abs=1e-4)


def test_a_broken_second_view_refuses_its_report(tmp_path: Path) -> None:
    source = tiny.write_set(tmp_path / "source", studies=3)
    one, two, three = (studies := StudyIndex(source))
    text = format_report_line([one, two], "Clear.") + format_report_line([three], "A nodule.")
    (source / "reports.jsonl").write_text(text)
    studies.resolve_image_path(two).write_bytes(b"no picture")
    made = make_report_questions(source, tmp_path / "out", allow_refused=1)
    assert [row.row for row in made.refused] == [1]
    assert [reference.answer for reference in load_references(tmp_path / "out")] == ["A nodule."]


def test_a_report_on_several_images_can_be_asked_about_its_first(tmp_path: Path) -> None:
    source = tiny.write_set(tmp_path / "source", studies=3)
    one, two, three = StudyIndex(source)
    (source / "reports.jsonl").write_text(
        format_report_line([two, one], "Clear.") + format_report_line([three], "A nodule.")
    )
    made = make_report_questions(source, tmp_path / "out", views="first")
    assert [question.study for question in load_questions(tmp_path / "out")] == [two, three]
    assert list(StudyIndex(tmp_path / "out")) == [two, three]
    assert list(read_reports(tmp_path / "out" / "reports.jsonl")) == [
        ReportRow(study=two, text="Clear."),
        ReportRow(study=three, text="A nodule."),
    ]
    assert "reports on several images, asked about the first: 1" in made.notes


def test_bad_rows_are_refused_with_a_remedy(tmp_path: Path) -> None:
    """The other rows are kept."""
    source = with_reports(tmp_path / "source", ["Clear.", " "], **{"study-0": "Of another set."})
    with pytest.raises(TooManyRefused) as refused:
        make_report_questions(source, tmp_path / "out")
    assert "reports.jsonl:2: the report is empty. Remove the row" in str(refused.value)
    assert "reports.jsonl:3: study 'study-0' is not in" in str(refused.value)
    assert "2 rows were refused, 0 allowed; the 1 others were kept" in str(refused.value)
    assert [reference.answer for reference in load_references(tmp_path / "out")] == ["Clear."]
    assert [row.text for row in read_reports(tmp_path / "out" / "reports.jsonl")] == ["Clear."]
    written = IngestReport.model_validate_json((tmp_path / "out" / "ingest_report.json").read_text())
    assert written == refused.value.report
    made = make_report_questions(source, tmp_path / "out", allow_refused=2)
    assert made == written


def test_a_broken_image_refuses_its_report(tmp_path: Path) -> None:
    source = with_reports(tmp_path / "source", ["Clear.", "A nodule."])
    studies = StudyIndex(source)
    broken = studies.resolve_image_path(next(iter(studies)))
    broken.write_bytes(broken.read_bytes()[:40])
    made = make_report_questions(source, tmp_path / "out", allow_refused=1)
    assert [row.row for row in made.refused] == [1]
    assert made.refused[0].reason.startswith(f"image: {broken}")
    assert [reference.answer for reference in load_references(tmp_path / "out")] == ["A nodule."]


def test_where_no_report_can_be_kept_the_folder_stays_as_it_was(tmp_path: Path) -> None:
    make_report_questions(with_reports(tmp_path / "source", ["Clear."]), tmp_path / "out")
    before = (tmp_path / "out" / "questions.jsonl").read_bytes()
    with pytest.raises(
        InvalidRecord, match=r"expected reports, but none of the 1 read could be kept\n.*jsonl:1: the report is"
    ):
        make_report_questions(with_reports(tmp_path / "empty", [" "]), tmp_path / "out")
    assert (tmp_path / "out" / "questions.jsonl").read_bytes() == before


def test_the_command_ends_with_1_where_rows_were_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = with_reports(tmp_path / "source", ["Clear.", " "]), tmp_path / "out"
    assert main(["report-questions", str(source), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("clincot report-questions: 1 row was refused, 0 allowed; the 1 others")
    assert "reports.jsonl:2: the report is empty" in said.out
    assert main(["report-questions", str(source), "--out", str(out), "--allow-refused", "1"]) == 0


def test_the_source_is_not_written_over(tmp_path: Path) -> None:
    source = with_reports(tmp_path / "source", ["Clear."])
    with pytest.raises(InvalidRecord, match="report questions need a folder of their own"):
        make_report_questions(source, source)
