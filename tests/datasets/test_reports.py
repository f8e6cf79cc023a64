"""reports.jsonl: what is refused, by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.datasets.reports import ReportRow, format_report_line, read_numbered_reports, read_reports
from clincot.jsonl import InvalidRecord


def test_rows_come_in_order(tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    path.write_text('{"study": "a", "text": "Clear."}\n\n{"study": "b", "text": "", "views": 2}\n')
    assert list(read_reports(path)) == [ReportRow(study="a", text="Clear."), ReportRow(study="b", text="", views=2)]
    assert [number for number, _ in read_numbered_reports(path)] == [1, 3]


def test_a_report_is_one_line_that_names_all_its_images(tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    lines = [format_report_line(["study-1"], "Normal – no effusion."), format_report_line(["study-2", "study-3"], "x")]
    assert lines[0] == '{"study": "study-1", "text": "Normal – no effusion."}\n'
    path.write_text("".join(lines), encoding="utf-8")
    assert list(read_reports(path)) == [
        ReportRow(study="study-1", text="Normal – no effusion."),
        ReportRow(study="study-2", text="x", studies=("study-2", "study-3")),
    ]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"study": "a", "text": "x"}\n{"study": "a", "text": "y"}\n', "reports.jsonl:2: a second report on study 'a'"),
        ('{"study": "a"}\n', r"reports.jsonl:1: not a report: text: Field required .* Write \{\"study\""),
        ('{"study": "a", "text": "x", "extra": 1}\n', "reports.jsonl:1: not a report: extra"),
        (
            '{"study": "a", "text": "x", "studies": ["b", "a"]}\n',
            "reports.jsonl:1: not a report: .*expected .* 'a' first, got 'b'",
        ),
        ("nonsense\n", "reports.jsonl:1: not JSON"),
        ('{"study": "a", "text": "x"}', "reports.jsonl:1: the file ends in the middle of a line"),
    ],
)
def test_a_bad_line_is_named(lines: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    path.write_text(lines)
    with pytest.raises(InvalidRecord, match=says):
        list(read_reports(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match="file not found; expected reports"):
        list(read_reports(tmp_path / "reports.jsonl"))
