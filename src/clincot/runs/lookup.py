"""The records of a run folder and of its data, looked up by scanning the files: no index, nothing held in memory."""

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

# By the end of a file's name: a chain's earlier steps stand in step-0.candidates.jsonl and so on.
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
    """Numbered lines of a file on which one of `words` (ids, or beginnings of ids) stands anywhere.

    For a few words, since each is tried on every line. Other lines are passed over unread, which is what makes a scan
    of a whole run take seconds; so a bad line that names none of the words is not noticed here.
    """
    if not words:
        return
    named = re.compile(b"|".join(re.escape(word.encode()) for word in sorted(words)))
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if named.search(line):
                yield number, line


def grep_records(path: Path, kind: type[R], words: Collection[str]) -> Iterator[R]:
    """The records on those lines, in the file's order. Raises BadRecord at a line that is none."""
    for number, line in grep_lines(path, words):
        yield parse_record_line(line, kind, path, number)


def parse_record_line(line: bytes, kind: type[R], path: Path, number: int) -> R:
    """One line as a record; raises BadRecord naming file and line."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None
    return parse_record(text, kind, where=f"{path}:{number}")


class RunRecords:
    """A run folder with the data set and the benchmark that its run.json names.

    The answer key of the data that rounds learn from is not among its files; the benchmark's is.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.about = layout.read_run(run)
        self.data = layout.resolve_run_path(run, self.about.data)
        self.benchmark = layout.resolve_run_path(run, self.about.benchmark)
        self.files = list(self._list_files())

    def _list_files(self) -> Iterator[tuple[Path, type[Record]]]:
        """Every file of records, in a fixed order."""
        for name, kind in RECORD_FILES.items():
            if kind is Reference:  # a data set may lie inside the run folder, so the run is not searched for keys
                places = [self.benchmark / name]
            else:
                inside = sorted(p for p in self.run.rglob(f"*{name}") if p.name == name or p.name.endswith(f".{name}"))
                places = [*inside, self.data / name, self.benchmark / name]
            for path in dict.fromkeys(places):
                if path.is_file():
                    yield path, kind
        for name, kind in layout.SINGLE_RECORD_FILES.items():
            for path in sorted(self.run.rglob(name)):
                yield path, kind

    def find_by_prefix(self, given: str) -> Iterator[Record]:
        """Records whose id, its hash, or the sha256 of what it names (image, checkpoint) begins with `given`."""
        for path, kind in self.files:
            if "-" in given and not given.startswith(f"{kind.prefix}-"):
                continue
            if path.suffix == ".json":
                record = read_json_model(path, kind)
                if _matches_prefix(given, record.id, getattr(record, "sha256", "")):
                    yield record
                continue
            for number, line in grep_lines(path, [given]):
                if _matches_prefix(given, *_read_names(line, path, number)):
                    yield parse_record_line(line, kind, path, number)

    def get_record(self, kind: type[R], one: str) -> R:
        """The record with this id; raises BadRecord where the run does not have it."""
        return self.locate_record(kind, one)[0]

    def locate_record(self, kind: type[R], one: str) -> tuple[R, Path]:
        """The record with this id and the file that it stands in."""
        for record, path in self._grep_kind(kind, one):
            if record.id == one:
                return record, path
        raise InvalidRecord(f"{self.run}: expected {one} among its {kind.prefix} records, but it is not there")

    def find_by_candidate(self, kind: type[R], candidate: str) -> list[R]:
        """The judgements or scores of a candidate, each once."""
        named = (record for record, _ in self._grep_kind(kind, candidate))
        return list({r.id: r for r in named if getattr(r, "candidate", "") == candidate}.values())

    def get_question_study(self, question: str) -> Study:
        return self.get_record(Study, self.get_record(Question, question).study)

    def find_study_folder(self, study: Study) -> Path:
        """The data set that a study's image lies in."""
        return self.locate_record(Study, study.id)[1].parent

    def find_checkpoint(self, policy: str) -> tuple[Checkpoint, Path] | None:
        """The policy with this digest and its folder, if the run trained it."""
        for folder, checkpoint in layout.iter_checkpoints(self.run):
            if checkpoint.sha256 == policy:
                return checkpoint, folder
        return None

    def _grep_kind(self, kind: type[R], one: str) -> Iterator[tuple[R, Path]]:
        for path, of in self.files:
            if of is kind and path.suffix == ".jsonl":
                for record in grep_records(path, kind, [f'"{one}"']):
                    yield record, path


def _read_names(line: bytes, path: Path, number: int) -> tuple[str, str]:
    """A line's id and sha256, read before the whole record is checked: most lines only mention the id."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InvalidRecord(f"{path}:{number}: not JSON ({error})") from None
    return str(content.get("id", "")), str(content.get("sha256", ""))


def _matches_prefix(given: str, *names: str) -> bool:
    return any(name.startswith(given) or name.partition("-")[2].startswith(given) for name in names if name)
