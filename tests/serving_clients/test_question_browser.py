"""All questions of a run in Chromium: 10,000 of a round and 24 of a benchmark, opened as files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from clincot.geometry import WHOLE_IMAGE, box_from_xyxy
from clincot.jsonl import read_records, write_records
from clincot.records import Candidate, Judgement, Outcome, PanelScore, PreferencePair, Question, Region, Study
from clincot.reporting.question_browser import write_question_browser
from tests.serving_clients.conftest import PROGRAMS, PYTHON, find_chromium
from tests.support.runs import write_films, write_run

COUNT = 10_000
TITLE = "All questions <img src=x onerror='window.injected = 1'>"
FILTERS = [
    ("search", '"NUMBER 77 seen" yes'),
    ("topic", "topic-1"),
    ("modality", "CT"),
    ("source", "round 1"),
    ("gap", "0.5"),
    ("agreement", "differ"),
    ("result", "base=right"),
    ("result", "won"),
    ("sort", "gap"),
    ("sort", "-spread"),
]


def fill_round(folder: Path, studies: list[Study]) -> None:
    """Replace a round's records: question n has topic n % 4, a gap of (n % 10) / 10 and a spread of (n % 5) / 10."""
    questions, regions, candidates, judgements, scores, pairs = [], [], [], [], [], []
    for n in range(COUNT):
        question = Question(
            study=studies[n % len(studies)].id,
            text=f"Is number {n} seen? <img src=x onerror='window.injected = 1'>",
            kind="closed",
            topic=f"topic-{n % 4}",
        )
        boxes = (box_from_xyxy((0.25, 0.25, 0.5, 0.5)), WHOLE_IMAGE)
        own = [Region(question=question.id, hypothesis="x", box=b, confidence=0.5, grounder="windows") for b in boxes]
        gap, answers = n % 10 / 10, []
        for region, text, score in zip(own, ("yes", "no"), (0.95, 0.95 - gap), strict=True):
            answer = Candidate(
                question=question.id,
                region=region.id,
                text=text,
                token_logprobs=(-0.5,),
                policy="p",
                prompt="w",
                seed=0,
                temperature=0.7,
            )
            answers.append(answer)
            judgements.append(Judgement(candidate=answer.id, judge="j", prompt="w", score=round(score, 2)))
            scores.append(PanelScore(candidate=answer.id, score=round(score, 2), spread=n % 5 / 10, judges=2))
        if gap:
            pairs.append(
                PreferencePair(
                    question=question.id,
                    chosen=answers[0].id,
                    rejected=answers[1].id,
                    chosen_region=own[0].id,
                    rejected_region=own[1].id,
                    chosen_score=0.95,
                    rejected_score=round(0.95 - gap, 2),
                    spread=0.0,
                )
            )
        questions.append(question)
        regions += own
        candidates += answers
    for name, records in (
        ("questions", questions),
        ("regions", regions),
        ("candidates", candidates),
        ("judgements", judgements),
        ("scores", scores),
        ("pairs", pairs),
    ):
        write_records(folder / f"{name}.jsonl", records)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browsed")
    write_films(root / "data", films=100, seed=1, split="train")
    write_films(root / "benchmark", films=24, seed=2, split="test", modality="CT")
    write_run(root / "run", root / "data", root / "benchmark", rounds=1, limit=20)
    fill_round(root / "run" / "round-01", list(read_records(root / "data" / "studies.jsonl", Study)))
    assert write_question_browser(root / "run", root / "out", title=TITLE) == COUNT + 24
    return root


@pytest.fixture(scope="module")
def found(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("shots")
    command = [str(PYTHON), str(PROGRAMS / "browse_questions.py"), str(run / "out" / "index.html"), find_chromium()]
    done = subprocess.run([*command, str(folder), json.dumps(FILTERS)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (folder / "page.pdf").stat().st_size > 10_000
    return json.loads(done.stdout.splitlines()[-1])


def test_ten_thousand_questions_are_paged(found: Any) -> None:
    """10,024 rows in pages of 50: 201 pages. Every filter answers within a second."""
    start = found["start"]
    assert start["count"] == "10,024 of 10,024 questions"
    assert (start["page"], start["rows"]) == ("Page 1 of 201", 50)
    assert all(found[f"{name} {value}"]["seconds"] < 1 for name, value in FILTERS)


def test_filters_select_what_they_say(found: Any, run: Path) -> None:
    """Of 10,000: a quarter each topic; gaps of 0.5 to 0.9 in half; spreads of 0.2 to 0.4 in three fifths."""

    def count(name: str) -> int:
        return int(found[name]["count"].partition(" of ")[0].replace(",", ""))

    assert count('search "NUMBER 77 seen" yes') == 1
    assert (count("topic topic-1"), count("modality CT"), count("source round 1")) == (2500, 24, 10_000)
    assert (count("gap 0.5"), count("agreement differ")) == (5000, 6000)
    correct = {}
    for name, folder in (("base", "base"), ("last", "round-01")):
        outcomes = read_records(run / "run" / folder / "outcomes.jsonl", Outcome)
        correct[name] = {outcome.question: outcome.correct for outcome in outcomes if outcome.arm == "written"}
    assert count("result base=right") == sum(value is True for value in correct["base"].values())
    won = [q for q, value in correct["base"].items() if value is False and correct["last"][q]]
    assert count("result won") == len(won) > 0


def test_sorting_puts_rows_without_a_value_last(found: Any) -> None:
    """The first question with the largest gap of 0.9 is number 9; with the smallest spread, number 0."""
    assert found["sort gap"]["first"][0].startswith("Is number 9 seen?")
    assert found["sort gap"]["first"][4] == "0.90"
    assert found["sort -spread"]["first"][0].startswith("Is number 0 seen?")


def test_everything_can_be_done_with_keys(found: Any) -> None:
    keys = found["keys"]
    assert keys["opened"] == ["0", "1", "0"]
    assert (keys["next page"], keys["previous page"]) == ("Page 2 of 201", "Page 1 of 201")
    assert keys["closed"]
    assert keys["focus"] == "search"


def test_a_question_shows_film_regions_answers_and_key(found: Any) -> None:
    """The boxes of two policies and that of the key; the film is loaded in its own width."""
    assert "Answer key: " in found["detail"]
    assert "base" in found["detail"]
    assert (found["boxes"], found["film"]) == (3, 96)


def test_dark_mode_print_and_a_phone(found: Any) -> None:
    assert found["light"] != found["dark"]
    assert found["print"] == {"background": "rgb(255, 255, 255)", "controls": False, "detail": True, "rows": 24}
    assert found["fits a phone"]


def test_an_address_brings_the_selection_back(found: Any) -> None:
    assert found["again"] == {"detail": found["detail"], "count": "24 of 10,024 questions"}


def test_nothing_is_run_or_fetched_from_elsewhere(found: Any) -> None:
    """Texts of questions contain markup; the page is opened as a file and asks no server."""
    assert found["injected"]
    assert found["complaints"] == []
    assert set(found["schemes"]) <= {"file", "data"}
