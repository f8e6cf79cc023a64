"""What preflight finds in the data sets and settings of a round: what would otherwise show after the training."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from clincot.config import PreflightConfig
from clincot.pipelines import tasks
from clincot.pipelines.params import encode_params
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.run_form import RunForm
from clincot.preflight.data_sets import build_data_set_probes, count_needed_patients
from clincot.preflight.preflight_report import PreflightCheck, PreflightReport
from clincot.preflight.probe import run_probes
from clincot.promotion.ledger import BudgetEntry, QuestionsUsed
from clincot.promotion.power import count_floor_questions
from clincot.records import Budget, Totals
from clincot.storage.folder_store import FolderStore
from tests.support import tiny

NO_TOTALS = Totals(clusters=8, n=16, total=0.0, squares=0.0, cross=0.0, sizes=32.0, n_unscored=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLINCOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fetched"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny.write_set(tmp_path / "data", key=False)


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    return tiny.write_set(tmp_path / "benchmark", seed=1, studies=8)


def checks_of(*, data: Path | str = "", benchmark: Path | str = "", **sections: Any) -> dict[str, PreflightCheck]:
    sections = {"prepare": {"rounds": 1}, **sections}
    addresses = {"data": str(data), "benchmark": str(benchmark), "calibration": str(sections.pop("calibration", ""))}
    config = PreflightConfig.model_validate({"timeout_s": 20.0, **addresses, **sections})
    return {check.name: check for check in run_probes(build_data_set_probes(config))}


def states(checks: dict[str, PreflightCheck]) -> dict[str, str]:
    return {name: check.state for name, check in checks.items()}


def test_data_sets_of_a_good_round(data: Path, benchmark: Path) -> None:
    """The first decision's level is 0.05 · 0.4375 · 0.6 = 0.0131; 2^-6 = 0.0156 is above it, 2^-7 = 0.0078 is not."""
    found = checks_of(data=data, benchmark=benchmark)
    assert found.pop("plan").state == "skipped"  # without a base policy nothing is known of its size
    assert states(found) == dict.fromkeys(
        [
            "cache",
            "data set",
            "benchmark: answer key",
            "benchmark: size",
            "benchmark: floors",
            "leak: images in training",
            "leak: patients in training",
            "leak: near-duplicates in training",
        ],
        "pass",
    )
    assert found["data set"].result == "12 questions about 6 images; one subset"
    assert found["benchmark: answer key"].result == "16 questions about 8 images"
    assert found["benchmark: size"].result == "16 questions about 8 patients; level 0.01312 needs at least 7"


def test_the_plan_of_a_round_is_a_line_of_the_table(data: Path, benchmark: Path) -> None:
    found = checks_of(data=data, benchmark=benchmark, base="shipped:policy", judge={"judges": [], "quorum": 1})["plan"]
    assert found.state == "pass", found.result
    assert re.fullmatch(
        r"[\d.]+ GPU-hours for 1 round \(A100 80 GB\), [\d.]+ GiB of GPU memory, [\d.]+ GB of storage, USD .+",
        found.result,
    )


def test_a_policy_of_unknown_size_leaves_the_plan_out(data: Path, benchmark: Path) -> None:
    found = checks_of(data=data, benchmark=benchmark, base="models/mine")["plan"]
    assert found.state == "skipped"
    assert "policy: models/mine is no folder with a config.json" in found.result


def test_without_addresses_nothing_is_opened() -> None:
    assert states(checks_of()) == {"cache": "pass", "data sets": "skipped"}


@pytest.mark.parametrize(("level", "patients"), [(0.5, 6), (1 / 64, 6), (0.015, 7), (0.0131, 7), (1 / 1024, 10)])
def test_patients_for_a_level(level: float, patients: int) -> None:
    """2^-C is the smallest p of C patients, and fewer than 6 show nothing."""
    assert count_needed_patients(level) == patients


def test_a_benchmark_of_few_patients_can_promote_nothing(data: Path, tmp_path: Path) -> None:
    few = tiny.write_set(tmp_path / "few", seed=1, studies=12, patients=6)
    size = checks_of(data=data, benchmark=few)["benchmark: size"]
    assert size.state == "fail"
    assert "24 questions about 6 patients; at level 0.01312 even a unanimous result needs 7 patients" in size.result
    assert "clincot power" in size.remedy
    # Half of the 12 patients on average are in a slice; those of slice 1 are counted
    many = tiny.write_set(tmp_path / "many", seed=1, studies=12)
    sliced = checks_of(data=data, benchmark=many, decide={"slices": 2})["benchmark: size"]
    assert "of slice 1 of 2" in sliced.result


def test_the_budget_that_is_spent_asks_for_more_patients(data: Path, benchmark: Path, tmp_path: Path) -> None:
    """Nine challengers were tested. Number 10 has 0.05 · 10^-1.6 / ζ(1.6) = 5.5e-4, and 0.6 of it for one look."""
    store = FolderStore(tmp_path / "store")
    write_ledger(store, tested=9)
    published = {"store": store.url, "name": "nodules"}
    size = checks_of(data=data, benchmark=benchmark, publish=published)["benchmark: size"]
    assert "8 patients; at level 0.00033 even a unanimous result needs 12 patients" in size.result


def test_a_benchmark_that_is_worn_out_is_told_before_the_round(data: Path, benchmark: Path, tmp_path: Path) -> None:
    """Every question was decided on twice, which is all that decide.max_uses allows here."""
    from clincot.datasets.folder import load_questions

    store = FolderStore(tmp_path / "store")
    write_ledger(store, tested=2, questions=tuple(question.id for question in load_questions(benchmark)))
    published = {"store": store.url, "name": "nodules"}
    size = checks_of(data=data, benchmark=benchmark, publish=published, decide={"max_uses": 2})["benchmark: size"]
    assert "All 16 questions of slice 1 have been decided on 2 times: the benchmark is worn out" in size.result
    changed = checks_of(data=data, benchmark=benchmark, publish=published, decide={"lifetime_error": 0.1})
    assert "decide.lifetime_error is 0.1, but the ledger was begun with 0.05" in changed["benchmark: size"].result


def write_ledger(store: FolderStore, *, tested: int, questions: tuple[str, ...] = ("q",)) -> None:
    spent, asked = [], []
    for number in range(1, tested + 1):
        budget = Budget(
            lifetime=0.05,
            number=number,
            challenger_number=number,
            look=1,
            challenger_level=0.001,
            passed_on=0.0,
            level=0.0006,
            spent_before=0.0,
        )
        spent.append(
            BudgetEntry(
                evidence=f"e{number}",
                champion="c",
                challenger=f"challenger-{number}",
                benchmark="b",
                verdict="keep",
                budget=budget,
                gain=NO_TOTALS,
                gain_rows=(),
                guards={},
                blind=NO_TOTALS,
            )
        )
        asked.append(QuestionsUsed(evidence=f"e{number}", number=number, slice=1, slices=1, questions=questions))
    for name, records in (("budget", spent), ("asked", asked)):
        text = "".join(f"{record.model_dump_json()}\n" for record in records)  # type: ignore[attr-defined]
        store.write_new(f"ledgers/nodules/{name}.jsonl", text.encode())


@pytest.mark.parametrize("wrong", ["no such folder", "a checkpoint", "no key", "no image"])
def test_a_benchmark_that_cannot_be_used(wrong: str, data: Path, benchmark: Path, tmp_path: Path) -> None:
    address, told = str(benchmark), ""
    if wrong == "no such folder":
        address, told = str(tmp_path / "nowhere"), "nowhere: no such folder"
    elif wrong == "a checkpoint":
        address, told = str(tiny.write_model(tmp_path / "model", 0)), "questions.jsonl: file not found"
    elif wrong == "no key":
        (benchmark / "references.jsonl").unlink()
        told = "references.jsonl"
    else:
        (benchmark / "images" / "3.png").unlink()
        told = "1 images are missing, first images/3.png"
    found = checks_of(data=data, benchmark=address)
    (failed,) = [check for check in found.values() if check.state == "fail"]
    assert told in failed.result
    assert found["data set"].state == "pass"  # the rest is checked all the same
    assert "benchmark: size" not in found


def test_questions_for_every_round(data: Path) -> None:
    """6 images in 40 subsets: most are empty, and the run of such a round would fail in prepare."""
    found = checks_of(data=data, prepare={"rounds": 40})["data set"]
    assert "12 questions, and none in subset " in found.result
    assert "prepare.rounds" in found.remedy
    (data / "images" / "0.png").unlink()
    assert "1 of 6 images are missing, first images/0.png" in checks_of(data=data)["data set"].result


def test_what_benchmark_and_data_share(data: Path, benchmark: Path, tmp_path: Path) -> None:
    """The benchmark as its own training and calibration data: every image, patient and answer is known."""
    found = checks_of(data=benchmark, benchmark=benchmark, calibration=benchmark)
    failed = {name for name, check in found.items() if check.state == "fail"}
    assert failed == {"leak: images in training", "leak: patients in training", "leak: answers in calibration"}
    assert "8 of the benchmark's 8 images are among the training data's" in found["leak: images in training"].result


def test_of_large_sets_near_duplicates_are_left_to_decide(
    data: Path, benchmark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clincot.preflight.data_sets.MAX_HASHED_IMAGES", 10)
    found = checks_of(data=data, benchmark=benchmark)
    assert found["leak: near-duplicates in training"].state == "skipped"
    assert found["leak: images in training"].state == "pass"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_cache_of_another_user_is_told_with_the_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new volume of block storage belongs to root with mode 0755; pods of a run have user 10001 and no fsGroup."""
    cache.parent.mkdir(mode=0o755)
    os.seteuid(10001)
    try:
        monkeypatch.setattr(os, "getuid", lambda: 10001)
        found = checks_of()["cache"]
    finally:
        os.seteuid(0)
    assert (found.state, "Permission denied" in found.result) == ("fail", True)
    assert "give the user 10001 the right to write there" in found.remedy


# --- the settings of a run, in the task


def run_preflight_task(tmp_path: Path, data: str, benchmark: str, **changed: dict[str, Any]) -> tuple[str, Path]:
    """The task with the sections of a plan, of which some are changed; what it says, and its report."""
    sections = {name: value for name, value in RoundPlan().arguments.items() if isinstance(value, dict)}
    for name, values in changed.items():
        sections[name] = {**sections[name], **encode_params(values)}
    outputs = {name: str(tmp_path / name) for name in ("report", "table", "champion")}
    form = RunForm(data, benchmark, store=str(tmp_path / "store"), model="nodules", base="", questions=0)
    with pytest.raises(SystemExit) as ended:
        tasks.preflight(form, sections, outputs)
    return str(ended.value), tmp_path / "report"


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("decide", {"min_gian": 0.1}, "min_gian"),
        ("decide", {"lifetime_error": 0.999}, "lifetime_error"),
        ("prepare", {"round": -1}, "round"),
        ("propose", {"grounder": {}}, "grounder"),
        ("answer", {"temprature": 1.0}, "temprature"),
        ("pair", {"min_gap": 0.0}, "min_gap"),
        ("train", {"learning_rate": 1.0}, "learning_rate"),
        ("evaluate", {"arms": ["written", "oracel"]}, "arms"),
        ("deploy", {"steps": [10, 50]}, "steps"),
        ("launch", {"mod": "torchrun"}, "mod"),
    ],
)
def test_a_wrong_key_in_any_section_fails_the_first_task(
    section: str, values: dict[str, Any], told: str, tmp_path: Path, data: Path, benchmark: Path
) -> None:
    said, path = run_preflight_task(tmp_path, str(data), str(benchmark), **{section: values})
    report = PreflightReport.model_validate_json(path.read_text(encoding="utf-8"))
    assert [check.name for check in report.failed] == [f"settings: {section}"]
    assert told in report.failed[0].result
    assert told in said
    assert "**FAIL**" in (tmp_path / "table").read_text(encoding="utf-8")


def test_the_empty_fields_of_the_form_fail_the_first_task(tmp_path: Path) -> None:
    said, path = run_preflight_task(tmp_path, "", "", pair={"gap": 1})
    report = PreflightReport.model_validate_json(path.read_text(encoding="utf-8"))
    assert [check.name for check in report.failed] == ["settings: data", "settings: benchmark", "settings: pair"]
    assert "fill in the field data of the run" in report.failed[0].remedy
    assert "settings: data: it is empty" in said


def test_a_decision_on_an_arm_that_is_not_evaluated(tmp_path: Path, data: Path, benchmark: Path) -> None:
    sections: dict[str, Any] = {"evaluate": {"arms": ["oracle"]}, "preflight": {"cluster": "no", "free_gb": 0.0}}
    said, _ = run_preflight_task(tmp_path, str(data), str(benchmark), **sections)
    assert "settings: decide.arm: decide.arm is 'written', and evaluate.arms has oracle" in said


def test_a_deployment_whose_answers_are_measured_is_decided_by_them(
    tmp_path: Path, data: Path, benchmark: Path
) -> None:
    """The task has service settings, so a promoted checkpoint is rolled out; it then answers as the arm served."""
    sections: dict[str, Any] = {
        "evaluate": {"arms": ["served", "written"]},
        "preflight": {"cluster": "no", "free_gb": 0.0},
    }
    said, path = run_preflight_task(tmp_path, str(data), str(benchmark), **sections)
    report = PreflightReport.model_validate_json(path.read_text(encoding="utf-8"))
    (check,) = [check for check in report.failed if check.name == "settings: decide.arm"]
    assert check.remedy == "set decide.arm to served"
    assert "decide.arm is 'written', but evaluate.arms has served" in said


def test_floors_that_a_benchmark_cannot_show_are_named(data: Path, benchmark: Path) -> None:
    """Level .0131: z = 2.22. A floor of .05 needs more than z^2 * .95 / .05 = 93.8 questions, one of .1 more than 44.4.

    At exactly the bound the t of "nothing changed" is z: sqrt(93.8 * .05 / .95) = 2.22.
    """
    level = 0.013125
    assert count_floor_questions(0.05, level) == 94
    assert count_floor_questions(0.1, level) == 45
    found = checks_of(data=data, benchmark=benchmark)
    assert "abstention (16 of 94 questions for a floor of 0.05)" in found["benchmark: floors"].result
    wide = dict.fromkeys(("closed_accuracy", "open_f1", "hit_rate", "hallucination", "abstention"), 0.5)
    found = checks_of(data=data, benchmark=benchmark, decide={"floors": wide})
    assert found["benchmark: floors"].result == "enough to show every floor if no answer changes"
