"""`clincot compare` on untrained tiny models: the plan, the table of two seeds, the same table again, missing rows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from clincot.cli.app import main
from clincot.comparison.comparison_plan import ComparisonPlan, estimate_plan, name_method, recognize_data_set
from clincot.comparison.comparison_results import TABLE_FILE, collect_comparison, grade_arm
from clincot.comparison.published_rows import PUBLISHED_ROWS, WARNING, find_published_rows
from clincot.config import Params, find_recipe
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.ingest.ingest_report import REPORT_FILE
from clincot.datasets.vqa_rad import ATTRIBUTION
from clincot.errors import InvalidInput
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.benchmark_report import pool_metrics
from clincot.evaluation.read_benchmark import read_benchmark
from clincot.geometry import WHOLE_IMAGE
from clincot.jsonl import read_records
from clincot.records import Outcome, Question, Reference
from tests.support import tiny
from tests.support.benchmark_builders import asked, outcome_of, study_of

POLICIES = ["base", "SFT on chosen, round 1", "plain DPO, round 1", "margin-DPO, round 1"]


@dataclass(frozen=True)
class World:
    folder: Path
    words: list[str]  # of the command line

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def table(self) -> str:
        return (self.run / TABLE_FILE).read_text()


def build_world(folder: Path) -> World:
    policy, *judges = (tiny.write_model(folder / name, seed) for seed, name in enumerate(("policy", "a", "b")))
    tiny.write_set(folder / "set" / "train")
    tiny.write_set(folder / "set" / "test", seed=1, studies=3)
    params = tiny.params(judges, evaluate={"arms": ["written", "random", "whole"]})
    head = {"name": "tiny", "about": "Untrained models, for a test of the comparison.", "policy": None}
    content = params.model_dump(mode="json", exclude={"recipe"}) | {"recipe": head}
    for inherited in ("judge", "publish", "version", "prepare", "propose", "train", "evaluate", "decide"):
        del content["preflight"][inherited]
    recipe = folder / "tiny.yaml"
    recipe.write_text(json.dumps(content))
    words = ["compare", "--recipe", str(recipe), "--data", str(folder / "set"), "--policy", str(policy)]
    return World(folder, [*words, "--run", str(folder / "run"), "--rounds", "1", "--set-name", "slake"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def compared(world: World) -> World:
    assert main([*world.words, "--seed", "0", "--seed", "1"]) == 0
    return world


def read_rows(table: str) -> dict[str, list[str]]:
    """{first cell: the others} of the first table."""
    lines = [line for line in table.split("\n\n")[0].splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


# The plan


def test_a_dry_run_prints_the_plan_and_runs_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*world.words, "--seed", "3", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert f"{world.folder / 'set' / 'train'}: 12 questions" in plan
    assert f"{world.folder / 'set' / 'test'}: 6 questions" in plan
    assert "rounds       1, seeds 3" in plan
    assert "; ".join(POLICIES) in plan
    assert "| propose " in plan  # counted by the processor of the checkpoint in the plan
    assert "| train                 | plain DPO " in plan
    assert not (world.folder / "run" / "seed-3").exists()


def test_a_dry_run_estimates_the_hours_of_a_published_model(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = find_recipe("llava-med-1.5-7b")
    words = ["compare", "--recipe", recipe.name, "--data", str(world.folder / "set"), "--dry-run", "--rounds", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    folder = world.folder / "set"
    plan = ComparisonPlan(
        folder, folder / "train", folder / "test", folder, recipe.params, 2, (0,), facts=recipe.policy
    )
    assert f"total: {estimate_plan(plan).total_hours:,.1f} GPU-hours (A100 80 GB) for 2 rounds" in printed
    assert "policy       models/llava-med-1.5-7b (LLaVA-Med 1.5 7B)" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--seed", "1", "--seed", "1"], "expected different seeds, got 1, 1"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(
    words: list[str], message: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*world.words, *words]) == 1
    assert message in capsys.readouterr().err


def test_a_recipe_without_a_policy_needs_one(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for at, word in enumerate(world.words) if "--policy" not in (word, world.words[at - 1])]
    assert main(words) == 1
    assert "expected --policy" in capsys.readouterr().err


def test_what_the_own_method_is_called() -> None:
    sections = ({}, {"margin_lambda": 0}, {"recipe": "code", "margin_lambda": 0}, {"loss": "odpo"})
    names = [name_method(Params.model_validate({"train": train})) for train in sections]
    assert names == ["margin-DPO", "DPO (recipe)", "margin-DPO", "ODPO"]


def test_a_set_is_recognized_by_the_report_of_its_ingest(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    assert recognize_data_set(tmp_path / "test") == ""
    (tmp_path / REPORT_FILE).write_text(json.dumps({"citation": ATTRIBUTION.citation}))
    assert recognize_data_set(tmp_path / "test") == "vqa-rad"


# The table


@pytest.mark.slow
def test_the_table_has_every_policy_in_every_arm(compared: World) -> None:
    rows = read_rows(compared.table)
    head = rows.pop("policy")
    arms = ("own region", "random region", "whole image")
    assert head[:3] == [f"accuracy (strict): {arm}" for arm in arms]
    assert list(rows) == [*POLICIES, "blind (no image)"]
    assert rows["base"][3] == "–"  # the base minus itself
    assert "[" in rows["margin-DPO, round 1"][3]


@pytest.mark.slow
def test_the_metrics_are_of_both_seeds_together(compared: World) -> None:
    """6 questions in each seed are 12 answers; the difference is paired by question and seed."""
    results = json.loads((compared.run / "comparison.json").read_text())
    rows = {row["row"]: row for row in results["rows"]}
    benchmark = read_benchmark(compared.folder / "set" / "test")
    for name, folder in zip(POLICIES, ("base", "round-01/sft", "round-01/dpo", "round-01"), strict=True):
        outcomes: dict[int, list[Outcome]] = {}
        for seed in (0, 1):
            path = compared.run / f"seed-{seed}" / folder / "outcomes.jsonl"
            outcomes[seed] = [one for one in read_records(path, Outcome) if one.arm == "written"]
        right = [bool(one.correct) for seed in (0, 1) for one in outcomes[seed]]
        accuracy = rows[name]["arms"]["written"]["accuracy"]
        assert accuracy["n"] == 12
        assert accuracy["value"] == pytest.approx(sum(right) / 12, abs=1e-6)
    assert rows["margin-DPO, round 1"]["gain"]["written"]["n"] == 12
    assert results["rows"][0]["arms"]["written"]["accuracy"]["clusters"] == len({*benchmark.clusters.values()})


@pytest.mark.slow
def test_seeds_differ_in_what_they_draw_and_not_in_their_data(compared: World) -> None:
    runs = [compared.run / f"seed-{seed}" / "round-01" for seed in (0, 1)]
    assert runs[0].joinpath("questions.jsonl").read_bytes() == runs[1].joinpath("questions.jsonl").read_bytes()
    assert runs[0].joinpath("regions.jsonl").read_bytes() != runs[1].joinpath("regions.jsonl").read_bytes()


@pytest.mark.slow
def test_published_rows_stand_beside_with_source_and_warning(compared: World) -> None:
    assert "| another policy | MedVR | accuracy | 85.3 | arXiv 2604.08203 |" in compared.table
    assert WARNING in compared.table


@pytest.mark.slow
def test_controls_that_were_left_out_are_named(compared: World) -> None:
    assert "**Missing.** The control oracle (oracle region) was not measured: evaluate.arms does not have it." in (
        compared.table
    )
    assert "The control random " not in compared.table


@pytest.mark.slow
def test_the_same_seeds_give_the_same_table(compared: World, capsys: pytest.CaptureFixture[str]) -> None:
    """One of the two seeds again from nothing, in another folder and another process with a hash seed of its own."""
    other = compared.folder / "again"
    words = [str(other) if word == str(compared.run) else word for word in compared.words]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "clincot", *words, "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    shutil.copytree(compared.run / "seed-0", other / "seed-0")
    assert main([*words, "--seed", "0", "--seed", "1", "--table"]) == 0
    assert (other / TABLE_FILE).read_text() == compared.table


@pytest.mark.slow
def test_a_policy_that_was_not_measured_is_named(
    compared: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(compared.run, tmp_path / "run"))
    lost = run / "seed-1" / "round-01" / "dpo" / "outcomes.jsonl"
    lost.unlink()
    words = [str(run) if word == str(compared.run) else word for word in compared.words]
    assert main([*words, "--seed", "0", "--seed", "1", "--table"]) == 1
    printed = capsys.readouterr().out
    assert f"**Missing.** plain DPO, round 1 was not measured: {lost} does not exist." in printed
    assert {*read_rows(printed)["plain DPO, round 1"]} == {"missing"}
    assert "[" in read_rows(printed)["margin-DPO, round 1"][0]


@pytest.mark.slow
def test_a_comparison_that_has_not_begun_has_missing_rows_only(world: World, tmp_path: Path) -> None:
    folder = world.folder / "set"
    plan = ComparisonPlan(tmp_path / "none", folder / "train", folder / "test", tmp_path, Params(), 1, (0,))
    results = collect_comparison(plan)
    assert [row["row"] for row in results["rows"] if row["missing"]] == POLICIES
    assert results["blind"]["accuracy"]["n"] == 6


# Pooling and published rows


def test_metrics_of_runs_are_pooled_question_by_question(world: World) -> None:
    """Two runs of 6 questions: one all right, one answering 3 of them, all wrong: 6 of 9, and 3 unscored."""
    benchmark = read_benchmark(world.folder / "set" / "test")

    def answer(question: str, *, right: bool) -> Outcome:
        reference = benchmark.references[question]
        text = reference.answer if right else "perhaps"
        return Outcome(
            question=question,
            policy="p",
            arm="whole",
            box=WHOLE_IMAGE,
            answer=text,
            reference=reference.id,
            correct=right,
            hit=None,
            iou=None,
        )

    first = [answer(question, right=True) for question in benchmark.questions]
    second = [answer(question, right=False) for question in list(benchmark.questions)[:3]]
    pooled = pool_metrics([(first, benchmark), (second, benchmark)])["whole"]["accuracy"]
    assert (pooled.n, pooled.n_unscored) == (9, 3)
    assert pooled.value == pytest.approx(6 / 9, abs=1e-6)


def test_the_gain_counts_the_questions_of_its_metric() -> None:
    """A choice is answered by a letter, so the protocol `parsed` does not count it, though it could read "left"."""
    study = study_of("film")
    choice = Question(study=study.id, text="Which side?", kind="choice", options=("left", "right"))
    yes, of_yes = asked(study, "Is there a nodule?", "yes")
    references = [Reference(question=choice.id, answer="left"), of_yes]
    benchmark = Benchmark.from_records([choice, yes], references, [study])
    outcomes = [
        outcome_of(benchmark, yes.id, "Yes, there is one."),
        Outcome(
            question=choice.id,
            policy="policy",
            arm="written",
            box=WHOLE_IMAGE,
            answer="A",
            reference=references[0].id,
            correct=True,
            hit=None,
            iou=None,
        ),
    ]
    assert grade_arm(outcomes, "written", "parsed_accuracy", benchmark) == {yes.id: 1.0}
    assert grade_arm(outcomes, "written", "accuracy", benchmark) == {yes.id: 0.0, choice.id: 1.0}
    pooled = pool_metrics([(outcomes, benchmark)])["written"]
    assert (pooled["parsed_accuracy"].n, pooled["accuracy"].n) == (1, 2)


def test_every_published_row_has_a_source() -> None:
    assert all(row.source for row in PUBLISHED_ROWS)
    assert all(row.value is None or 0 < row.value < 100 for row in PUBLISHED_ROWS)


def test_rows_of_the_policy_come_first() -> None:
    rows = find_published_rows("Lingshu 7B", "slake")
    assert [(row.policy, row.value) for row in rows] == [("Lingshu 7B", 83.1), ("", 85.3)]
    assert [(row.policy, row.value) for row in find_published_rows("", "slake")] == [("", 85.3)]


def test_the_tiny_sets_are_what_the_arithmetic_says(world: World) -> None:
    folder = world.folder / "set" / "test"
    assert len(StudyIndex(folder)) == 3
    assert len(list(load_questions(folder))) == len(list(load_references(folder))) == 6
    with pytest.raises(InvalidInput):
        find_recipe("tiny")
