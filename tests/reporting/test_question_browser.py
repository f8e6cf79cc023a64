"""All questions of a run: what the rows and details say, and what they must not contain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clincot.jsonl import InvalidRecord, read_records, write_records
from clincot.records import Candidate, Judgement, Outcome, PanelScore, PreferencePair, Question, Reference
from clincot.reporting.question_browser import write_pages, write_question_browser
from tests.support.runs import write_films, write_run

TITLE = "Two rounds & a </script>"


def read_script(path: Path) -> tuple[Any, Any]:
    """The two values that a data file hands to the page."""
    text = path.read_text(encoding="utf-8")
    first, _, second = text[text.index("(") + 1 : text.rindex(");")].partition(",\n")
    return json.loads(first), json.loads(second)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    write_films(root / "data", films=40, seed=1, split="train")
    write_films(root / "benchmark", films=24, seed=2, split="test", modality="CT")
    write_run(root / "run", root / "data", root / "benchmark", limit=20)
    assert write_question_browser(root / "run", root / "out", title=TITLE) == 64
    return root


@pytest.fixture(scope="module")
def rows(root: Path) -> list[dict[str, Any]]:
    facts, rows = read_script(root / "out" / "data" / "rows.js")
    assert (facts["title"], facts["policies"]) == (TITLE, ["base", "round 1", "round 2"])
    return [dict(zip(facts["columns"], row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def details(root: Path) -> list[dict[str, Any]]:
    number, details = read_script(root / "out" / "data" / "details-00000.js")
    assert number == 0
    return list(details)


def test_every_question_of_every_round_and_of_the_benchmark_is_a_row(root: Path, rows: list[dict[str, Any]]) -> None:
    """20 questions in each of two rounds, and 24 of the benchmark."""
    expected = []
    for source, folder in (("round 1", "run/round-01"), ("round 2", "run/round-02"), ("benchmark", "benchmark")):
        questions = read_records(root / folder / "questions.jsonl", Question)
        expected += [(question.id, source) for question in questions]
    assert [(row["id"], row["source"]) for row in rows] == expected
    assert {(row["source"], row["modality"]) for row in rows} == {
        ("round 1", "squares"),
        ("round 2", "squares"),
        ("benchmark", "CT"),
    }


def test_gap_spread_and_results_are_those_of_the_records(root: Path, rows: list[dict[str, Any]]) -> None:
    folder = root / "run" / "round-02"
    question_of = {c.id: c.question for c in read_records(folder / "candidates.jsonl", Candidate)}
    gaps: dict[str, float] = {}
    for pair in read_records(folder / "pairs.jsonl", PreferencePair):
        gaps[pair.question] = max(gaps.get(pair.question, 0.0), pair.gap)
    spreads: dict[str, list[float]] = {}
    for score in read_records(folder / "scores.jsonl", PanelScore):
        if score.score is not None:
            spreads.setdefault(question_of[score.candidate], []).append(score.spread)
    outcomes = {o.question: o for o in read_records(folder / "outcomes.jsonl", Outcome) if o.arm == "written"}
    for row in rows:
        if row["source"] == "round 2":
            own = spreads[row["id"]]
            assert row["gap"] == (round(gaps[row["id"]], 4) if row["id"] in gaps else None)
            assert row["spread"] == pytest.approx(sum(own) / len(own), abs=1e-4)
            assert row["results"] is None
        if row["source"] == "benchmark":
            assert row["results"]["round 2"] == outcomes[row["id"]].correct
            assert (row["gap"], row["spread"]) == (None, None)


def test_details_hold_every_candidate_with_its_judges(
    root: Path, rows: list[dict[str, Any]], details: list[dict[str, Any]]
) -> None:
    folder = root / "run" / "round-01"
    candidates = list(read_records(folder / "candidates.jsonl", Candidate))
    scores: dict[str, list[float | None]] = {}
    for judgement in read_records(folder / "judgements.jsonl", Judgement):
        scores.setdefault(judgement.candidate, []).append(judgement.score)
    shown = [one for detail in details[:20] for one in detail["candidates"]]
    assert [one["id"] for one in shown] == [candidate.id for candidate in candidates]
    assert [[score for _, score, _ in one["judges"]] for one in shown] == [scores[one["id"]] for one in shown]
    assert {name for one in shown for name, _, _ in one["judges"]} == {"judge-a", "judge-b"}
    assert sum(len(detail["pairs"]) for detail in details[:20]) == len(
        (folder / "pairs.jsonl").read_text().splitlines()
    )
    assert [row["answers"] for row in rows[:20]] == [
        list(dict.fromkeys(one["text"] for one in detail["candidates"])) for detail in details[:20]
    ]


def test_films_are_stored_once_in_a_small_size(root: Path, details: list[dict[str, Any]]) -> None:
    """40 films of the rounds' questions and 24 of the benchmark; none is wider than 512 px."""
    names = {detail["film"][0] for detail in details}
    assert {path.name for path in (root / "out" / "films").iterdir()} == names
    assert len(names) == 64
    with Image.open(root / "out" / "films" / min(names)) as film:
        assert film.size == (96, 80)


def test_the_answer_key_of_the_rounds_is_never_read(root: Path, tmp_path: Path) -> None:
    """Without data/references.jsonl the folder has the same bytes; the key of the benchmark is in it."""
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("out"))
    (copy / "data" / "references.jsonl").unlink()
    about = json.loads((copy / "run" / "run.json").read_text())
    about |= {"data": str(copy / "data"), "benchmark": str(copy / "benchmark")}
    (copy / "run" / "run.json").write_text(json.dumps(about))
    write_question_browser(copy / "run", copy / "out", title=TITLE)
    for path in (root / "out").rglob("*.*"):
        assert path.read_bytes() == (copy / "out" / path.relative_to(root / "out")).read_bytes(), path
    _, details = read_script(root / "out" / "data" / "details-00000.js")
    keys = [reference.answer for reference in read_records(root / "benchmark" / "references.jsonl", Reference)]
    assert [detail["key"]["answer"] for detail in details[40:]] == keys
    assert not any("key" in detail for detail in details[:40])


def test_no_value_ends_a_script(root: Path) -> None:
    for path in (root / "out" / "data").iterdir():
        assert "<" not in path.read_text(encoding="utf-8")


def test_a_candidate_out_of_order_is_named(root: Path, tmp_path: Path) -> None:
    """The last question's candidates come first: nothing may be shown without its candidates."""
    run = Path(shutil.copytree(root / "run", tmp_path / "run"))
    path = run / "round-01" / "candidates.jsonl"
    records = list(read_records(path, Candidate))
    write_records(path, [*records[-6:], *records[:-6]])
    with pytest.raises(InvalidRecord, match=r"candidates.jsonl: expected the order of the questions, but question-"):
        write_question_browser(run, tmp_path / "out", title=TITLE)


def test_the_page_links_to_all_questions(root: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(root / "run", tmp_path / "run"))
    page = write_pages(run, title=TITLE)
    assert 'href="questions/index.html"' in page.read_text(encoding="utf-8")
    assert (run / "questions" / "index.html").is_file()
    (run / "questions" / "films" / "0123456789abcdef.webp").write_bytes(b"of an earlier state")
    write_pages(run, title=TITLE)
    assert not (run / "questions" / "films" / "0123456789abcdef.webp").exists()
