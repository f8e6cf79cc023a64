import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from clincot.jsonl import InvalidRecord, atomic_write, hash_files, parse_row, read_records, write_records
from clincot.records import Question

QUESTIONS = [
    Question(study="study-1", text="Is there an effusion?", kind="closed"),
    Question(study="study-1", text="¿Dónde está la lesión? 病变在哪里", kind="open"),
]


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "questions.jsonl"
    assert write_records(path, QUESTIONS) == 2
    assert list(read_records(path, Question)) == QUESTIONS
    assert path.read_bytes().count(b"\n") == 2


def test_same_records_same_bytes(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", QUESTIONS)
    write_records(tmp_path / "b.jsonl", iter(QUESTIONS))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_blank_lines_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n" + QUESTIONS[0].model_dump_json() + "\n\n   \n")
    assert list(read_records(path, Question)) == QUESTIONS[:1]


def test_truncated_file_names_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write_records(path, QUESTIONS)
    path.write_bytes(path.read_bytes()[:-30])
    records = read_records(path, Question)
    assert next(records) == QUESTIONS[0]  # the lines before it are valid
    with pytest.raises(InvalidRecord, match=r"q\.jsonl:2: the file ends in the middle of a line; it was cut off"):
        next(records)


def test_a_missing_final_newline_is_an_error_too(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write_records(path, QUESTIONS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidRecord, match=r"q\.jsonl:2: the file ends in the middle of a line"):
        list(read_records(path, Question))


def test_unknown_field_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    row = {"study": "study-1", "text": "Where?", "kind": "open", "colour": "red"}
    path.write_text(QUESTIONS[0].model_dump_json() + "\n" + json.dumps(row) + "\n")
    expected = r"q\.jsonl:2: not a Question: colour: Extra inputs are not permitted \(got 'red'\)"
    with pytest.raises(InvalidRecord, match=expected):
        list(read_records(path, Question))


def test_duplicate_id_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write_records(path, [*QUESTIONS, QUESTIONS[0]])
    with pytest.raises(InvalidRecord, match=rf"q\.jsonl:3: duplicate id '{QUESTIONS[0].id}'"):
        list(read_records(path, Question))


def test_not_json_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(QUESTIONS[0].model_dump_json() + "\n<html>\n")
    with pytest.raises(InvalidRecord, match=r"q\.jsonl:2: not a Question: Invalid JSON"):
        list(read_records(path, Question))


def test_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"text": "l\xe9sion"}\n')  # Latin-1
    with pytest.raises(InvalidRecord, match=r"q\.jsonl:1: not UTF-8 \(.* at byte 11\)"):
        list(read_records(path, Question))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write_records(path, QUESTIONS)
    before = path.read_bytes()

    def failing() -> Iterator[Question]:
        yield QUESTIONS[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(path, failing())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["q.jsonl"]  # and no temporary file


def test_the_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "note.txt") as file:
        file.write("half")
        assert not (tmp_path / "note.txt").exists()
    assert (tmp_path / "note.txt").read_text() == "half"


def test_parse_row() -> None:
    assert parse_row(b'{"answer": 2}\r\n', where="x:1") == {"answer": 2}
    assert parse_row('\ufeff{"answer": "sí"}'.encode(), where="x:1") == {"answer": "sí"}  # a byte order mark
    assert parse_row(rb'{"answer": "\uD83D\uDE00"}', where="x:1") == {"answer": "😀"}  # a whole surrogate pair


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"answer": "ye', r"x:7: not JSON \(Unterminated string starting at at column 12\): '{\"answer\": \"ye'"),
        (b'["yes"]', "x:7: expected a JSON object, got list"),
        (b'{"answer": "\xff"}', "x:7: not UTF-8"),
        (b'{"answer": "yes", "answer": "no"}', "x:7: the field 'answer' occurs twice in one row"),
        (b'{"\\uD83D": "yes"}', "x:7: half of a surrogate pair"),
        (b"[" * 100_000, "x:7: nested too deeply"),
    ],
)
def test_parse_row_names_the_problem(line: bytes, message: str) -> None:
    with pytest.raises(InvalidRecord, match=message):
        parse_row(line, where="x:7")


def test_file_digest_is_over_the_bytes_in_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    assert hash_files(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"onetwo").hexdigest()
    assert hash_files(tmp_path / "b", tmp_path / "a") == hashlib.sha256(b"twoone").hexdigest()
