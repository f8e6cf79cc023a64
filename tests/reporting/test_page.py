from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from clincot.images import InvalidImage
from clincot.jsonl import InvalidRecord, read_records, write_records
from clincot.promotion.evidence import EvidenceRow
from clincot.records import Decision, Judgement, PreferencePair, Reference, Study
from clincot.reporting.gallery import (
    GalleryRound,
    PageImages,
    sample_by_hash,
    select_benchmark_examples,
    select_pair_examples,
    select_question_examples,
    split_evenly,
)
from clincot.reporting.page import write_page
from clincot.runs.layout import read_judge_names
from tests.support.runs import VIEWS, write_films, write_run

VOID = {"meta", "img", "br"}


class Read(HTMLParser):
    """Every element with its attributes, and the text; raises where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a benchmark and a finished run of two rounds. Tests that change it take a copy."""
    root = tmp_path_factory.mktemp("page")
    write_films(root / "data", films=40, seed=1, split="train")
    write_films(root / "benchmark", films=24, seed=2, split="test")
    write_run(root / "run", root / "data", root / "benchmark", limit=20)
    return root


@pytest.fixture(scope="module")
def page(root: Path) -> Read:
    write_page(root / "run", root / "page.html", title="Two rounds & a <title>")
    return Read((root / "page.html").read_text(encoding="utf-8"))


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """The run alone, elsewhere; its data stay where they are."""
    return Path(shutil.copytree(root / "run", tmp_path / "run"))


def rounds_of(run: Path) -> list[GalleryRound]:
    return [GalleryRound(n, run / f"round-{n:02d}", VIEWS, read_judge_names(run / f"round-{n:02d}")) for n in (1, 2)]


def test_the_recipes_protocol_comes_first_and_exact_match_second(copy: Path, root: Path, tmp_path: Path) -> None:
    """A run by the protocol parsed: its accuracy has the whisker, the difference to the base and the first figure.

    The parsed accuracies are made up (.7 and .05 more a row, so .9 in round 2); those of exact match are the run's own.
    """
    results = json.loads((copy / "results.json").read_text())
    results["protocol"] = "parsed"
    for number, row in enumerate((*results["rows"], results["blind"])):
        for metrics in row["arms"].values():
            value = round(0.7 + 0.05 * number, 3)
            metrics["parsed_accuracy"] = metrics["accuracy"] | {"value": value, "low": value - 0.1, "high": value + 0.1}
    for gain in results["gains"]:
        for metrics in gain.values():
            if isinstance(metrics, dict):
                metrics["parsed_accuracy"] = metrics["correct"] | {"value": 0.1, "low": 0.05, "high": 0.15}
    (copy / "results.json").write_text(json.dumps(results))
    write_page(copy, tmp_path / "page.html", title="parsed")
    text = Read((tmp_path / "page.html").read_text(encoding="utf-8")).text
    first = text.index("Accuracy by the recipe's protocol (parsed), base → round 2")
    second = text.index("Accuracy by exact match, base → round 2")
    assert first < second
    assert "0.700 → 0.900 paired difference +0.100 [+0.050, +0.150]" in text[first:second]
    heading = text.index("region accuracy (parsed) vs base accuracy (strict)")
    assert heading > second


def test_nothing_is_loaded_and_nothing_is_run(page: Read) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "srcset", "xlink:href"}:
                assert value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")), value[:80]
            assert "url(" not in value
    style = (tag for tag, _ in page.elements if tag == "style")
    assert len(list(style)) == 1


def test_every_reference_inside_the_page_has_its_target(page: Read) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in page.elements if a.get("href", "").startswith("#")}
    assert wanted <= set(ids)
    assert len({name for name in wanted if name.startswith("film-")}) > 6


def test_every_film_is_on_the_page_once(page: Read, root: Path) -> None:
    """Each film on the page is the image of its study."""
    studies = {
        f"film-{s.sha256[:12]}": folder / s.image
        for folder in (root / "data", root / "benchmark")
        for s in read_records(folder / "studies.jsonl", Study)
    }
    films = [attributes for tag, attributes in page.elements if tag == "image"]
    assert len(films) == len({film["id"] for film in films})
    for film in films:
        encoded = base64.b64decode(film["href"].partition(",")[2])
        with Image.open(io.BytesIO(encoded)) as shown, Image.open(studies[film["id"]]) as original:
            assert shown.size == original.size
            assert shown.mode == "L"  # grey in, grey out: a third of the bytes
            bright = [image.convert("L").point(lambda v: 255 * (v > 160)).getbbox() for image in (shown, original)]
        assert bright[0] is not None
        assert bright[1] is not None
        assert all(abs(a - b) <= 1 for a, b in zip(*bright, strict=True))  # the square is where it was


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(root: Path, copy: Path, tmp_path: Path) -> None:
    write_page(root / "run", tmp_path / "a.html", title="Two rounds")
    write_page(copy, tmp_path / "b.html", title="Two rounds")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_what_records_say_is_text_and_never_markup(page: Read) -> None:
    assert "Two rounds & a <title>" in page.text
    assert "On which side is the <square>?" in page.text
    assert "square" not in {tag for tag, _ in page.elements}


def test_the_table_shows_the_results(page: Read, root: Path) -> None:
    results = json.loads((root / "run" / "results.json").read_text())
    for row in results["rows"]:
        for arm in row["arms"].values():
            value = arm["accuracy"]
            assert f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in page.text
    gain = next(g for g in results["gains"] if g["row"] == "round 2")["written"]["correct"]
    signed = [f"{gain[name]:+.3f}".replace("-", "−") for name in ("value", "low", "high")]
    assert f"paired difference {signed[0]} [{signed[1]}, {signed[2]}]" in page.text
    names = [row["row"] for row in results["rows"]]
    assert names == [
        "base",
        "round 1",
        "SFT on chosen, round 1",
        "plain DPO, round 1",
        "round 2",
        "SFT on chosen, round 2",
        "plain DPO, round 2",
    ]
    places = [page.text.index(f"{name} 24 questions") for name in [*names, "blind baseline"]]
    assert places == sorted(places)


def test_few_patients_and_the_blind_baseline_are_noted(page: Read) -> None:
    """24 benchmark films are of 12 patients; the fixture's blind baseline is fitted on the benchmark itself."""
    assert "Intervals from fewer than 40 patients are approximate; this benchmark has 12." in page.text
    assert "the most frequent answer of the benchmark itself" in page.text


def test_decisions_curves_digests_and_the_statement_are_there(page: Read, root: Path) -> None:
    for number in (1, 2):
        (decision,) = read_records(root / "run" / f"round-{number:02d}" / "decision.json", Decision)
        assert f"Round {number} {decision.verdict}" in page.text
        for reason in decision.reasons:
            assert reason in page.text
        rows = read_records(root / "run" / f"round-{number:02d}" / "evidence.jsonl", EvidenceRow)
        right = [(row.sides["champion"].correct, row.sides["challenger"].correct) for row in rows]
        won, lost = right.count((False, True)), right.count((True, False))
        assert won + lost > 0
        counts = f"only the challenger was right on {won}, only the champion on {lost}; {min(4, won + lost)} examples"
        assert counts in page.text
    for title in ("Preference loss", "Reward accuracy", "Reward margin", "Chosen answer's NLL"):
        assert title in page.text
    for judge in read_judge_names(root / "run" / "round-01"):
        assert judge in page.text
    assert "not clinical evidence" in page.text


def test_only_rendered_radiographs_are_called_one_anatomy(page: Read, tmp_path: Path) -> None:
    for name, seed in (("data", 1), ("benchmark", 2)):
        write_films(tmp_path / name, films=20, seed=seed, split=name, modality="rendered radiograph")
    write_run(tmp_path / "run", tmp_path / "data", tmp_path / "benchmark", rounds=1, limit=20)
    write_page(tmp_path / "run", tmp_path / "page.html", title="t")
    text = Read((tmp_path / "page.html").read_text()).text
    assert "One anatomy, controlled; not clinical evidence." in text
    assert "One anatomy" not in page.text


def test_a_record_that_is_missing_is_named(root: Path, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "data", tmp_path / "data")
    (tmp_path / "data" / "studies.jsonl").write_text("")
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(run | {"data": str(tmp_path / "data")}))
    with pytest.raises(InvalidRecord, match=r"data/studies\.jsonl: expected study-[0-9a-f]{20}, which another record"):
        write_page(copy, tmp_path / "page.html", title="t")
    assert not (tmp_path / "page.html").exists()


def test_the_answer_key_of_preference_data_is_never_opened(root: Path, tmp_path: Path) -> None:
    """A folder under the key's name: whoever opens it fails."""
    write_page(root / "run", tmp_path / "before.html", title="t")
    key = root / "data" / "references.jsonl"
    key.rename(tmp_path / "key")
    key.mkdir()
    try:
        write_page(root / "run", tmp_path / "after.html", title="t")
    finally:
        key.rmdir()
        (tmp_path / "key").rename(key)
    assert (tmp_path / "after.html").read_bytes() == (tmp_path / "before.html").read_bytes()


def test_a_run_that_is_not_finished_shows_what_there_is(copy: Path, tmp_path: Path) -> None:
    for path in ("decision.json", "pairs.jsonl", "outcomes.jsonl", "panel.report.json", "pairs.report.json"):
        (copy / "round-02" / path).unlink()
    shutil.rmtree(copy / "round-02" / "policy")
    write_page(copy, tmp_path / "page.html", title="t")
    page = Read((tmp_path / "page.html").read_text())
    assert "Round 2 no decision" in page.text
    assert re.search(r"round 1 · gap", page.text)
    assert not re.search(r"round 2 · gap", page.text)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.json", None, r"results\.json: no such file; expected a run folder"),
        ("results.json", "{", r"results\.json:1: not JSON"),
        ("results.json", "{}", r"results\.json: not a RunResults: rows: Field required"),
        ("run.json", '{"data": 1}', r"run\.json: not a RunFile: data: .*valid string"),
        ("round-01/policy/train_log.json", "{}", r"train_log\.json: expected a list of objects"),
        ("round-01/panel.report.json", "[]", r"panel\.report\.json: not a _ReportedPanel"),
        ("round-01/pairs.report.json", "[]", r"pairs\.report\.json: expected a JSON object, got list"),
        ("round-01/pairs.jsonl", '{"id": "pair-1"}\n', r"pairs\.jsonl:1: not a PreferencePair"),
    ],
)
def test_a_bad_file_is_named_and_no_page_is_left(
    copy: Path, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    if content is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(content)
    with pytest.raises(InvalidRecord, match=message):
        write_page(copy, tmp_path / "out" / "page.html", title="t")
    assert not (tmp_path / "out").exists()


def test_a_bad_image_is_named(root: Path, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "data", tmp_path / "data")
    for image in (tmp_path / "data" / "images").iterdir():
        image.write_bytes(b"no image")
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(run | {"data": str(tmp_path / "data")}))
    with pytest.raises(InvalidImage, match=r"data/images/\d{6}\.png: expected a PNG or JPEG file"):
        write_page(copy, tmp_path / "page.html", title="t")


def test_examples_are_drawn_by_their_ids_alone() -> None:
    ids = [f"pair-{n}" for n in range(50)]
    assert sample_by_hash(ids, 6) == sample_by_hash(reversed(ids), 6)
    assert sample_by_hash(ids, 6) == sample_by_hash([*ids, *ids], 6)
    assert sample_by_hash(ids, 6)[:3] == sample_by_hash(ids, 3)
    assert sample_by_hash(["pair-1"], 6) == ["pair-1"]
    assert sample_by_hash(ids, 6) != ids[:6]


def test_examples_are_spread_over_the_rounds() -> None:
    assert split_evenly(6, 2) == [3, 3]
    assert split_evenly(6, 4) == [2, 2, 1, 1]
    assert split_evenly(6, 0) == []


def test_an_unscored_judgement_is_shown_as_such(root: Path) -> None:
    """The tenth judgement of each round has no score, so its candidate has no panel score either (quorum 2)."""
    judgements = read_records(root / "run" / "round-01" / "judgements.jsonl", Judgement)
    unscored = next(one for one in judgements if one.score is None)
    shown = select_question_examples(rounds_of(root / "run")[:1], root / "data", PageImages(), 1000)
    answers = {answer.id: (one, answer) for one in shown for answer in one.answers}
    one, answer = answers[unscored.candidate]
    assert [score.value is None for score in answer.scores] == [False, True]  # judge-b gave the tenth
    assert answer.scores[1].reason == unscored.reason
    assert answer.panel is not None
    assert answer.panel.score is None
    assert one.answers[-1].id == answer.id  # after everything that has a score


def test_candidates_stand_by_their_panel_score(root: Path) -> None:
    for one in select_question_examples(rounds_of(root / "run"), root / "data", PageImages(), 1000):
        scores = [a.panel.score for a in one.answers if a.panel is not None and a.panel.score is not None]
        assert scores == sorted(scores, reverse=True)
        assert len(one.film.marks) == 6  # 2 windows, 3 written, the whole image


def test_both_sides_of_a_pair_are_as_recorded(root: Path) -> None:
    recorded = {p.id: p for p in read_records(root / "run" / "round-01" / "pairs.jsonl", PreferencePair)}
    shown = select_pair_examples(rounds_of(root / "run")[:1], root / "data", PageImages(), 5)
    assert len(shown) == 5
    assert len({one.question.id for one in shown}) == 5
    for one in shown:
        pair = recorded[one.pair.id]
        assert (one.chosen.id, one.rejected.id) == (pair.chosen, pair.rejected)
        for side, score in ((one.chosen, pair.chosen_score), (one.rejected, pair.rejected_score)):
            assert side.panel is not None
            assert side.panel.score == pytest.approx(score)
            with Image.open(io.BytesIO(base64.b64decode(side.crop.partition(",")[2]))) as crop:
                assert max(crop.size) == VIEWS.crop_px  # as large as the policy saw it


def test_benchmark_examples_show_every_policy_and_the_key(root: Path) -> None:
    run = root / "run"
    policies = [
        ("base", run / "base" / "outcomes.jsonl", VIEWS),
        ("round 1", run / "round-01" / "outcomes.jsonl", VIEWS),
    ]
    shown = select_benchmark_examples(policies, root / "benchmark", "written", PageImages(), 6)
    assert len(shown) == len({one.question.study for one in shown}) == 6
    for one in shown:
        assert [answer.policy for answer in one.answers] == ["base", "round 1"]
        assert {(a.outcome.question, a.outcome.arm) for a in one.answers} == {(one.question.id, "written")}
        assert [mark.label for mark in one.film.marks] == ["base", "round 1", "answer key"]
    assert select_benchmark_examples(policies, root / "benchmark", "relevance", PageImages(), 6) == []


def test_benchmark_examples_do_not_need_boxes_in_the_key(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "benchmark", tmp_path / "benchmark"))
    key = [r.model_copy(update={"boxes": ()}) for r in read_records(folder / "references.jsonl", Reference)]
    rows = [Reference.model_validate(r.model_dump(exclude={"id"})) for r in key]
    write_records(folder / "references.jsonl", rows)
    shown = select_benchmark_examples(
        [("base", root / "run" / "base" / "outcomes.jsonl", VIEWS)], folder, "written", PageImages(), 6
    )
    assert [[mark.label for mark in one.film.marks] for one in shown] == [["base"]] * 6


def test_an_image_outside_the_data_folder_is_refused(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "data", tmp_path / "data"))
    lines = (folder / "studies.jsonl").read_text().replace('"images/', '"../images/')  # the path is not in the id
    (folder / "studies.jsonl").write_text(lines)
    with pytest.raises(InvalidRecord, match="expected an image inside"):
        select_pair_examples(rounds_of(root / "run"), folder, PageImages(), 2)
