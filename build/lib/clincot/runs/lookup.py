"""Look up the records of a run folder and of its data by scanning the files, without an index."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TypeVar

from clincot.jsonl import InvalidRecord, parse_record, read_json_model
from clincot.records import (
    Candidate,
    Checkpoint,
    Judgement,
    Outcome,
    PanelScore,
    PreferencePair,
    Question,
    Record,
    Reference,
    Region,
    Study,
)
from clincot.runs import layout

R = TypeVar("R", bound=Record)

# {end of a file name: record}. The earlier steps of a chain are in step-0.candidates.jsonl and so on.
RECORD_FILES: dict[str, type[Record]] = {
    "pairs.jsonl": PreferencePair,
    "candidates.jsonl": Candidate,
    "regions.jsonl": Region,
    "questions.jsonl": Question,
    "studies.jsonl": Study,
    "judgements.jsonl": Judgement,
    "scores.jsonl": PanelScore,
    "outcomes.jsonl": Outcome,
    "references.jsonl": Reference,
}


def grep_lines(path: Path, words: Collection[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) for the lines of a file that contain one of `words` (ids, or beginnings of ids).

    Lines that do not contain a wanted id are skipped without parsing, so scanning a run takes seconds; an invalid
    line among them goes unnoticed. Meant for few words, because each one is searched in every line.
    """
    if not words:
        return
    pattern = re.compile(b"|".join(re.escape(word.encode()) for word in sorted(words)))
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if pattern.search(line):
                yield number, line


def grep_records(path: Path, kind: type[R], words: Collection[str]) -> Iterator[R]:
    """Yield the records on the lines that contain one of `words`. Raises InvalidRecord at an invalid one."""
    for number, line in grep_lines(path, words):
        yield parse_record_line(line, kind, path, number)


def parse_record_line(line: bytes, kind: type[R], path: Path, number: int) -> R:
    """Parse one line as a record. Raises InvalidRecord, which names file and line."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None
    return parse_record(text, kind, where=f"{path}:{number}")


class RunRecords:
    """The records of a run folder, and of the data set and the benchmark that its run.json names.

    The answer key of the benchmark is included; that of the training data is not.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.about = layout.read_run(run)
        self.data = layout.resolve_run_path(run, self.about.data)
        self.benchmark = layout.resolve_run_path(run, self.about.benchmark)
        self.files = list(self._list_files())

    def _list_files(self) -> Iterator[tuple[Path, type[Record]]]:
        """Yield every file of records with the kind of its records, in a fixed order."""
        for name, kind in RECORD_FILES.items():
            if kind is Reference:  # the run folder is not searched: it may contain the data set
                candidates = [self.benchmark / name]
            else:
                inside = sorted(p for p in self.run.rglob(f"*{name}") if p.name == name or p.name.endswith(f".{name}"))
                candidates = [*inside, self.data / name, self.benchmark / name]
            for path in dict.fromkeys(candidates):
                if path.is_file():
                    yield path, kind
        for name, kind in layout.SINGLE_RECORD_FILES.items():
            for path in sorted(self.run.rglob(name)):
                yield path, kind

    def find_by_prefix(self, prefix: str) -> Iterator[Record]:
        """Yield the records whose id, hash in the id, or sha256 (of an image, a checkpoint) begins with `prefix`."""
        for path, kind in self.files:
            if "-" in prefix and not prefix.startswith(f"{kind.prefix}-"):
                continue
            if path.suffix == ".json":
                record = read_json_model(path, kind)
                if _matches_prefix(prefix, record.id, getattr(record, "sha256", "")):
                    yield record
                continue
            for number, line in grep_lines(path, [prefix]):
                if _matches_prefix(prefix, *_read_names(line, path, number)):
                    yield parse_record_line(line, kind, path, number)

    def get_record(self, kind: type[R], record_id: str) -> R:
        """Return the record with this id. Raises InvalidRecord if the run does not contain it."""
        return self.locate_record(kind, record_id)[0]

    def locate_record(self, kind: type[R], record_id: str) -> tuple[R, Path]:
        """Return the record with this id and its file. Raises InvalidRecord if the run does not contain it."""
        for record, path in self._grep_kind(kind, record_id):
            if record.id == record_id:
                return record, path
        raise InvalidRecord(f"{self.run}: expected {record_id} among its {kind.prefix} records, but it is not there")

    def find_by_candidate(self, kind: type[R], candidate: str) -> list[R]:
        """List the judgements or scores of a candidate, without duplicates."""
        records = (record for record, _ in self._grep_kind(kind, candidate))
        return list({r.id: r for r in records if getattr(r, "candidate", "") == candidate}.values())

    def get_question_study(self, question: str) -> Study:
        """Return the study of the question with this id."""
        return self.get_record(Study, self.get_record(Question, question).study)

    def find_study_folder(self, study: Study) -> Path:
        """Return the folder of the data set that contains a study's image."""
        return self.locate_record(Study, study.id)[1].parent

    def find_checkpoint(self, policy: str) -> tuple[Checkpoint, Path] | None:
        """Return the policy with this digest and its folder, or None if the run did not train it."""
        for folder, checkpoint in layout.iter_checkpoints(self.run):
            if checkpoint.sha256 == policy:
                return checkpoint, folder
        return None

    def _grep_kind(self, kind: type[R], record_id: str) -> Iterator[tuple[R, Path]]:
        """Yield the records of a kind whose lines mention an id."""
        for path, file_kind in self.files:
            if file_kind is kind and path.suffix == ".jsonl":
                for record in grep_records(path, kind, [f'"{record_id}"']):
                    yield record, path


def _read_names(line: bytes, path: Path, number: int) -> tuple[str, str]:
    """Return id and sha256 of a line. Cheaper than parsing the record, and most lines only mention the id."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InvalidRecord(f"{path}:{number}: not JSON ({error})") from None
    return str(content.get("id", "")), str(content.get("sha256", ""))


def _matches_prefix(prefix: str, *names: str) -> bool:
    return any(name.startswith(prefix) or name.partition("-")[2].startswith(prefix) for name in names if name)
