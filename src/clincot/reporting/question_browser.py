"""All questions of a run in a browser: searched, filtered and sorted, with every candidate and every outcome.

The page of a run (page.py) shows a few examples in one file. This folder shows everything:

    index.html, question_browser.js, question_browser.css    the same for every run
    data/rows.js             one row for each question: what is searched, filtered and sorted
    data/details-00000.js    100 rows each: regions, candidates, scores, outcomes; loaded when a row is opened
    films/HASH.webp          the images, at most 512 px; loaded when a row is opened

Data are scripts that call one function, because a page that is opened as a file may not fetch JSON. The answer key is
shown for benchmark questions only; data/references.jsonl is never opened. The same run gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Generic

from clincot.config import load_params
from clincot.datasets.folder import StudyIndex
from clincot.geometry import WHOLE_IMAGE, Box
from clincot.images import open_image
from clincot.jsonl import InvalidRecord, R, atomic_write, read_records
from clincot.records import (
    Candidate,
    Judgement,
    Outcome,
    PanelScore,
    PreferencePair,
    Question,
    Reference,
    Region,
    Study,
)
from clincot.reporting.gallery import resolve_image_path
from clincot.reporting.page import write_page
from clincot.runs import layout

BROWSER_FOLDER = "questions"
DETAILS_PER_FILE = 100
FILM_PX = 512
_STATIC = Path(__file__).parent / "static"
_STATIC_FILES = {
    "index.html": "question_browser.html",
    "question_browser.js": "question_browser.js",
    "question_browser.css": "question_browser.css",
}
# Columns of a row. gap: the largest of the question's pairs; spread: the mean of its candidates, None without scores;
# results: {policy: right}, of benchmark questions only.
ROW_COLUMNS = ("id", "source", "text", "topic", "kind", "modality", "gap", "spread", "results", "answers")


class _InOrder(Generic[R]):
    """Records of a file in the order of the questions, a question at a time."""

    def __init__(self, path: Path, kind: type[R], key: Callable[[R], str]) -> None:
        self._path = path
        self._groups = groupby(read_records(path, kind) if path.is_file() else (), key=key)
        self._next: tuple[str, list[R]] | None = None
        self._advance()

    def take(self, key: str) -> list[R]:
        """The records with this key; [] if the next record has another one."""
        if self._next is None or self._next[0] != key:
            return []
        records = self._next[1]
        self._advance()
        return records

    def check_end(self) -> None:
        """Raises InvalidRecord if a record is left: it belongs to no question, or the order differs."""
        if self._next is not None:
            raise InvalidRecord(f"{self._path}: expected the order of the questions, but {self._next[0]} is not in it")

    def _advance(self) -> None:
        found = next(self._groups, None)
        self._next = None if found is None else (found[0], list(found[1]))


@dataclass
class _BrowserFiles:
    """The rows and details as they are written."""

    folder: Path
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    pending: list[dict[str, Any]] = field(default_factory=list)
    films: set[str] = field(default_factory=set)

    def add(self, row: tuple[Any, ...], detail: dict[str, Any]) -> None:
        self.rows.append(row)
        self.pending.append(detail)
        if len(self.pending) == DETAILS_PER_FILE:
            self.write_details()

    def write_details(self) -> None:
        if self.pending:
            number = (len(self.rows) - 1) // DETAILS_PER_FILE
            _write_script(self.folder / "data" / f"details-{number:05d}.js", "addDetails", number, self.pending)
            self.pending = []

    def add_film(self, study: Study, data: Path) -> str:
        """Store a study's film if it is new; return its name."""
        name = f"{study.sha256[:16]}.webp"
        if name not in self.films:
            self.films.add(name)
            path = self.folder / "films" / name
            if not path.is_file():
                image = open_image(resolve_image_path(study, data))
                image.thumbnail((FILM_PX, FILM_PX))
                image.save(path, format="WEBP", quality=80, method=2)
        return name


def write_pages(run: Path, *, title: str) -> Path:
    """Write page.html of a run and all its questions beside it; return the path of page.html."""
    write_question_browser(run, run / BROWSER_FOLDER, title=title)
    page = run / "page.html"
    write_page(run, page, title=title, browser=f"{BROWSER_FOLDER}/index.html")
    return page


def write_question_browser(run: Path, out: Path, *, title: str) -> int:
    """Write the folder; return the number of rows.

    Raises InvalidRecord if a file of the run is missing or malformed, InvalidImage if an image is.
    """
    about = layout.read_run(run)
    arm = load_params(run / layout.PARAMS_FILE).decide.arm
    data, benchmark = (layout.resolve_run_path(run, path) for path in (about.data, about.benchmark))
    shutil.rmtree(out / "data", ignore_errors=True)
    for name in ("data", "films"):
        (out / name).mkdir(parents=True, exist_ok=True)
    files = _BrowserFiles(out)
    for folder in layout.list_round_folders(run):
        if (folder / layout.ROUND_FILES["scores"]).is_file():
            _add_round(files, folder, data)
    policies = _list_outcomes(run, arm)
    if policies:
        _add_benchmark(files, benchmark, policies)
    files.write_details()
    facts = {"title": title, "arm": arm, "policies": list(policies), "size": DETAILS_PER_FILE}
    _write_script(out / "data" / "rows.js", "setRows", {**facts, "columns": ROW_COLUMNS}, files.rows)
    for path in (out / "films").iterdir():
        if path.name not in files.films:  # of an earlier state of the run
            path.unlink()
    for name, source in _STATIC_FILES.items():
        shutil.copyfile(_STATIC / source, out / name)
    return len(files.rows)


def _add_round(files: _BrowserFiles, folder: Path, data: Path) -> None:
    """Add the questions of a round with their candidates, one after another."""
    names, source = layout.read_judge_names(folder), f"round {layout.parse_round_number(folder)}"
    studies = StudyIndex(data)
    paths = {name: folder / file for name, file in layout.ROUND_FILES.items()}
    regions = _InOrder(paths["regions"], Region, lambda region: region.question)
    candidates = _InOrder(paths["candidates"], Candidate, lambda candidate: candidate.question)
    judgements = _InOrder(paths["judgements"], Judgement, lambda judgement: judgement.candidate)
    scores = _InOrder(paths["scores"], PanelScore, lambda score: score.candidate)
    pairs = _InOrder(paths["pairs"], PreferencePair, lambda pair: pair.question)
    for question in read_records(paths["questions"], Question):
        study = studies[question.study]
        by_id = {region.id: region for region in regions.take(question.id)}
        answers, spreads = [], []
        for candidate in candidates.take(question.id):
            score = next(iter(scores.take(candidate.id)), None)
            if score is not None and score.score is not None:
                spreads.append(score.spread)
            if candidate.region not in by_id:
                raise InvalidRecord(
                    f"{paths['regions']}: expected {candidate.region} of {candidate.id}, but it is missing"
                )
            answers.append(
                _describe_candidate(candidate, by_id[candidate.region], score, judgements.take(candidate.id), names)
            )
        own_pairs = pairs.take(question.id)
        row = _build_row(
            question,
            study,
            source,
            gap=max((round(pair.gap, 4) for pair in own_pairs), default=None),
            spread=round(sum(spreads) / len(spreads), 4) if spreads else None,
            answers=[answer["text"] for answer in answers],
        )
        chosen = [{"chosen": pair.chosen, "rejected": pair.rejected, "gap": round(pair.gap, 4)} for pair in own_pairs]
        files.add(row, {"film": _describe_film(files, study, data), "candidates": answers, "pairs": chosen})
    for reader in (regions, candidates, judgements, scores, pairs):
        reader.check_end()


def _describe_candidate(
    candidate: Candidate,
    region: Region,
    score: PanelScore | None,
    judgements: Sequence[Judgement],
    names: dict[str, str],
) -> dict[str, Any]:
    return {
        "id": candidate.id,
        "text": candidate.text,
        "step": candidate.step,
        "box": _list_corners(region.box),
        "hypothesis": region.hypothesis,
        "grounder": region.grounder,
        "score": None if score is None or score.score is None else round(score.score, 4),
        "spread": None if score is None or score.score is None else round(score.spread, 4),
        "reason": "no panel score" if score is None else score.reason,
        "judges": [[names.get(one.judge, one.judge[:10]), one.score, one.reason] for one in judgements],
    }


def _list_outcomes(run: Path, arm: str) -> dict[str, dict[str, Outcome]]:
    """{policy: {question: outcome in the arm of decisions}}: the base policy and that of every round."""
    folders = [("base", run / "base")]
    folders += [(f"round {layout.parse_round_number(path)}", path) for path in layout.list_round_folders(run)]
    policies = {}
    for name, folder in folders:
        path = folder / layout.ROUND_FILES["outcomes"]
        if path.is_file():
            outcomes = (outcome for outcome in read_records(path, Outcome) if outcome.arm == arm)
            policies[name] = {outcome.question: outcome for outcome in outcomes}
    return policies


def _add_benchmark(files: _BrowserFiles, folder: Path, policies: dict[str, dict[str, Outcome]]) -> None:
    """Add the benchmark's questions that a policy answered, with the answer key."""
    references = {reference.question: reference for reference in read_records(folder / "references.jsonl", Reference)}
    studies = StudyIndex(folder)
    for question in read_records(folder / "questions.jsonl", Question):
        outcomes = {name: found[question.id] for name, found in policies.items() if question.id in found}
        if not outcomes:
            continue
        study, reference = studies[question.study], references[question.id]
        row = _build_row(
            question,
            study,
            "benchmark",
            results={name: outcome.correct for name, outcome in outcomes.items()},
            answers=[reference.answer, *(outcome.answer for outcome in outcomes.values())],
        )
        detail = {
            "film": _describe_film(files, study, folder),
            "key": {"answer": reference.answer, "boxes": [_list_corners(box) for box in reference.boxes]},
            "outcomes": [_describe_outcome(name, outcome) for name, outcome in outcomes.items()],
        }
        files.add(row, detail)


def _describe_outcome(policy: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "policy": policy,
        "text": outcome.answer,
        "correct": outcome.correct,
        "hit": outcome.hit,
        "iou": outcome.iou,
        "off_format": outcome.off_format,
        "box": _list_corners(outcome.box),
    }


def _build_row(
    question: Question,
    study: Study,
    source: str,
    *,
    gap: float | None = None,
    spread: float | None = None,
    results: dict[str, bool | None] | None = None,
    answers: Iterable[str] = (),
) -> tuple[Any, ...]:
    """A row with the values of ROW_COLUMNS; of equal answers, one is kept for the search."""
    distinct = list(dict.fromkeys(answers))
    return (
        question.id,
        source,
        question.text,
        question.topic,
        question.kind,
        study.modality,
        gap,
        spread,
        results,
        distinct,
    )


def _describe_film(files: _BrowserFiles, study: Study, data: Path) -> list[Any]:
    return [files.add_film(study, data), study.width, study.height]


def _list_corners(box: Box) -> list[float] | None:
    """The corners as shares of the image; None for the whole image, which is not drawn."""
    return None if box == WHOLE_IMAGE else [round(corner, 4) for corner in box.xyxy]


def _write_script(path: Path, function: str, first: Any, second: Any) -> None:
    """Write a call of the page's function with two JSON values; "<" is escaped, so that no value can end a script."""
    with atomic_write(path) as file:
        file.write(f"clincot.{function}(")
        file.writelines(_encode_json(first))
        file.write(",\n")
        file.writelines(_encode_json(second))
        file.write(");\n")


def _encode_json(content: Any) -> Iterator[str]:
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for chunk in encoder.iterencode(content):
        yield chunk.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
