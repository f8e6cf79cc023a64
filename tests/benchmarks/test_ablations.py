"""Ablations change one thing of the recipe's first round, and leave the rest as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ablations as module
from benchmarks.ablations import Ablation, list_ablations, plan_recipe, render_ablations, run_ablation
from benchmarks.forest_chart import ForestRow, render_forest_chart
from clincot.config import load_params
from clincot.demo import walkthrough
from clincot.geometry import WHOLE_IMAGE
from clincot.jsonl import read_records
from clincot.records import Interval, Judgement, PreferencePair, Region
from clincot.rounds import run_rounds


def test_every_ablation_changes_the_recipe() -> None:
    params = load_params(None, recipe="small-model")
    for ablation in list_ablations():
        changed = module._override_params(params, ablation.overrides)
        sections = {name for name in ("pair", "train") if getattr(changed, name) != getattr(params, name)}
        assert sections or ablation.panel or ablation.whole_image or ablation.by_key or ablation.all_data, ablation.name
        same = params.model_copy(update={name: getattr(changed, name) for name in sections})
        assert changed == same, f"{ablation.name} changes more than pair and train"


def test_names_and_folders_are_unique() -> None:
    ablations = list_ablations()
    assert len({a.name for a in ablations}) == len(ablations)
    assert len({a.folder for a in ablations}) == len(ablations)


def _judgement(judge: str, score: float | None) -> Judgement:
    return Judgement(candidate="c", judge=judge, prompt="p", score=score, reason="" if score is not None else "mute")


def test_only_the_named_judge_is_distorted_and_what_it_did_not_score_stays_so() -> None:
    judgements = [_judgement("a", 0.9), _judgement("b", 0.8), _judgement("b", None)]
    inverted = list(module._distort_judgements(judgements, "inverted", "b"))
    assert [j.score for j in inverted] == [0.9, pytest.approx(0.2), None]
    assert [j.score for j in module._distort_judgements(judgements, "constant", "b")] == [0.9, 0.5, None]
    noisy = [j.score for j in module._distort_judgements(judgements, "noisy", "b")]
    assert noisy[0] == 0.9
    assert noisy[1] not in {0.8, 0.5}


def test_a_forest_chart_places_intervals_around_zero() -> None:
    rows = [ForestRow("margin", "λ <2>", Interval(value=0.02, low=-0.01, high=0.05, n=10))]
    svg = render_forest_chart(rows, "difference")
    # the widest edge is .05, so the axis reaches from -.05 to .05; inner width 320 from x = 310: .02 lies at
    # 310 + 320 * (.02 + .05) / .1 = 534
    assert 'cx="534.0"' in svg
    assert "λ &lt;2&gt;" in svg
    assert "+0.020 [-0.010, +0.050]" in svg


@pytest.mark.slow
def test_a_tiny_run_with_one_ablation_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = walkthrough.DemoSize(images=40, benchmark_images=4, rounds=1)
    monkeypatch.setattr(walkthrough, "FULL_SIZE", tiny)
    run_rounds(plan_recipe(tmp_path, 0))
    names = {
        "answers from the whole image alone",
        "judge-b inverted, guarded by agreement",
        "pairs checked with the key",
    }
    chosen = [a for a in list_ablations() if a.name in names or a.name == "plain DPO"]
    assert len(chosen) == 4
    for ablation in chosen:
        run_ablation(tmp_path, 0, ablation)
    seed = tmp_path / "seed-0"

    def pairs(ablation: Ablation, name: str = "pairs.jsonl") -> set[str]:
        return {pair.id for pair in read_records(seed / ablation.folder / name, PreferencePair)}

    by_name = {ablation.name: ablation for ablation in chosen}
    recipe = {pair.id for pair in read_records(seed / "round-01" / "pairs.jsonl", PreferencePair)}
    assert pairs(by_name["plain DPO"]) == recipe, "another loss, the same pairs"
    assert pairs(by_name["pairs checked with the key"], "checked.pairs.jsonl") <= recipe
    guarded = seed / by_name["judge-b inverted, guarded by agreement"].folder
    assert (guarded / "no_pairs.txt").is_file(), "judges that contradict each other on every topic make no pair"
    whole = {r.id for r in read_records(seed / "round-01" / "regions.jsonl", Region) if r.box == WHOLE_IMAGE}
    made = read_records(seed / by_name["answers from the whole image alone"].folder / "pairs.jsonl", PreferencePair)
    assert {side for pair in made for side in (pair.chosen_region, pair.rejected_region)} <= whole


def test_the_table_names_what_was_changed_and_which_seeds_had_no_pair() -> None:
    share = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    measured = dict.fromkeys(("served", "gain", "against_recipe", "oracle", "off_format"), share)
    rows = [
        {"name": "λ 2", "group": "margin", "pairs": 7, **measured},
        {"name": "judge-b noise", "group": "panel", "pairs": 0, "without_pairs": [0, 2]},
    ]
    text = render_ablations({"seeds": [0, 2], "questions": 10, "patients": 4, "rows": rows})
    assert "| margin | λ 2 | 7 | 0.500 [0.400, 0.600] |" in text
    assert "no pair is left (seeds 0, 2)" in text
    assert [row.name for row in module._list_chart_rows({"rows": rows})] == ["λ 2"]
