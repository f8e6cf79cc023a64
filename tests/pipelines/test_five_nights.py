"""Five nights of a recurring run: a killed pod in the second, a promotion in the third, a failed page in the fourth.

The schedule is set up by the real client on the stand-in for Kubeflow Pipelines, and every night takes its parameters
from the version that the recurring run names. Each night calls the functions that the components call, in the order of
pipelines/round.py, on a real store, git repository and DVC remote, with the real promotion gate. Preference data,
checkpoints and answers are written by the test in place of a model: what a model would add is in test_run_local.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clincot.config import Params, PublishConfig
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.read_benchmark import read_benchmark
from clincot.jsonl import read_records, write_json, write_records
from clincot.pipelines import round_page, tasks
from clincot.pipelines.client import connect_pipelines
from clincot.pipelines.params import encode_params
from clincot.pipelines.recurring import RunSchedule, reconcile_recurring_run
from clincot.pipelines.round_files import RoundContext, RoundFiles
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.run_settings import write_settings
from clincot.preferences.versions.init import init_repository
from clincot.preflight.starting_policy import resolve_starting_policy
from clincot.promotion.ledger import BudgetEntry
from clincot.records import Checkpoint, Decision, Outcome
from clincot.registry.champion import create_champion_pointer, promote_champion, read_champion
from clincot.registry.publication import PublicationEvidence, register_checkpoint
from clincot.runs.exporter import read_line_state
from clincot.runs.round_records import find_round_end, find_round_failure, find_round_start, read_round_outputs
from clincot.storage.folder_store import FolderStore
from tests.support import tiny
from tests.support.benchmark_builders import outcome_of
from tests.support.deployment_builders import write_checkpoint
from tests.support.kfp_stub import PipelinesStub, serving
from tests.support.preference_data import write_round

pytestmark = pytest.mark.slow

LINE = "nodules"
# What Kubeflow Pipelines 2.17.0 tells the exit task of these nights: RUNNING for one whose tail came from the cache,
# and also for one that failed.
REPORTED = {1: "COMPLETE", 2: "RUNNING", 3: "COMPLETE", 4: "RUNNING", 5: "COMPLETE"}
FLOORS = ("closed_accuracy", "open_f1", "hit_rate", "hallucination", "abstention")
DECIDE = {"resamples": 20, "floors": dict.fromkeys(FLOORS, 0.9)}  # 16 patients cannot show that less was kept


@dataclass
class Platform:
    """A namespace with its store, data repository and Kubeflow Pipelines."""

    folder: Path
    store: FolderStore
    repository: Path
    data: Path
    benchmark: Benchmark
    stub: PipelinesStub
    policies: dict[int, str] = field(default_factory=dict)  # {round: digest of its challenger}; 0: the base

    def parameters(self) -> dict[str, Any]:
        """The parameters of a run that the schedule starts now: the defaults of the version that it names."""
        (recurring,) = self.stub.recurring
        named = recurring["pipeline_version_reference"]["pipeline_version_id"]
        (version,) = [one for one in self.stub.versions if one["pipeline_version_id"] == named]
        stored = version["pipeline_spec"]  # with a platform spec, both are below it
        inputs = stored.get("pipeline_spec", stored)["root"]["inputDefinitions"]["parameters"]
        return {name: given.get("defaultValue") for name, given in inputs.items()}

    def write_outcomes(self, path: Path, policy: str, *, right: bool) -> str:
        """Answers to the benchmark: all right, or none."""
        outcomes: list[Outcome] = []
        for question in self.benchmark.questions:
            reference = self.benchmark.references[question]
            answer = reference.answer if right else {"yes": "no"}.get(reference.answer, "middle")
            outcomes.append(outcome_of(self.benchmark, question, answer, policy=policy, hit=right, iou=0.5))
        write_records(path, outcomes)
        return str(path)


@pytest.fixture
def platform(tmp_path: Path) -> Any:
    store = FolderStore(tmp_path / "store")
    repository = tmp_path / "preferences.git"
    init_repository(str(repository), str(tmp_path / "remote"))
    data = tiny.write_set(tmp_path / "data", key=False)
    folder = tiny.write_set(tmp_path / "benchmark", seed=1, studies=16)
    base = register_checkpoint(
        store, write_checkpoint(tmp_path / "base", 1.0), PublishConfig(name=LINE), PublicationEvidence()
    )
    create_champion_pointer(store, base, by="ann")
    params = Params.model_validate(
        {
            "publish": {"store": store.url, "name": LINE},
            "version": {"repository": str(repository)},
            "decide": DECIDE,
        }
    )
    with serving(PipelinesStub()) as stub:
        plan = RoundPlan(params=params, data=str(data), benchmark=str(folder))
        reconcile_recurring_run(connect_pipelines(stub.url), plan, RunSchedule(cron="0 0 2 * * *"))
        yield Platform(tmp_path, store, repository, data, read_benchmark(folder), stub, {0: base.sha256})


@dataclass
class Night:
    """One run of the schedule, task by task."""

    platform: Platform
    number: int  # of the night
    kill_version: bool = False
    better: bool = False
    page_fails: bool = False

    @property
    def run(self) -> str:
        return f"night-{self.number}"

    @property
    def folder(self) -> Path:
        return self.platform.folder / self.run

    def play(self) -> str:
        """All tasks of the run; what its exit task says."""
        parameters = self.platform.parameters()
        publish = parameters["publish"] | {"store": parameters["store"], "name": parameters["model"]}
        parameters["publish"] = publish
        try:
            self._play_round(parameters)
        except SystemExit:
            assert self.page_fails
        return tasks.record_run_status(publish, state=REPORTED[self.number], run_id=self.run, error="")

    def _play_round(self, parameters: dict[str, Any]) -> None:
        publish = parameters["publish"]
        self.folder.mkdir()
        config = Params.model_validate({"publish": {"store": self.platform.store.url, "name": LINE}})
        champion = resolve_starting_policy(config.get_stage_config("preflight"))[0]  # type: ignore[arg-type]
        number = int(parameters["number"])
        started = tasks.start_round(publish, champion.model_dump_json(), number=number, run_id=self.run)
        at = write_round(self.folder / "data", 3, seed=started.number)
        self._version(parameters["version"], publish, started.number, at)
        challenger = write_checkpoint(
            self.folder / "policy", 1.0 + started.number, parent=started.policy_digest, round_=started.number
        )
        decision = self._decide(parameters, at, started.policy_digest, challenger)
        files = {name: str(self.folder / name) for name in RoundFiles.__dataclass_fields__}
        files |= {name: str(path) for name, path in at.items()}
        for name in ("outcomes", "report"):
            Path(files[name]).write_text(name, encoding="utf-8")
        tasks.record_round(
            publish,
            RoundFiles(**files),
            number=started.number,
            checkpoint_digest=self.platform.policies[started.number],
            run_id=self.run,
        )
        if decision.verdict == "promote":
            self._publish_and_roll_out(challenger, decision, started.policy_digest)
        tasks.end_round(publish, run_id=self.run, rounds=1)
        context = RoundContext(started.number, "policy", "checkpoint", "champion-results")
        settings = write_settings(self.platform.store.url, {"publish": publish}, {})
        page = str(self.folder / "page.html")
        tasks.page(settings, context, RoundFiles(**files), page=page, results="results.md", questions="questions")

    def _version(self, section: dict[str, Any], publish: dict[str, Any], number: int, at: dict[str, Path]) -> None:
        origin = tasks.describe_data_origin(publish, number=number, run_id=self.run)
        inputs = {name: str(path) for name, path in at.items()}
        outputs = {"version": str(self.folder / "version.json")}
        if self.kill_version:
            self._kill_the_pod(section, origin, inputs, outputs)
        tasks.run_stage_task("version", section, inputs, outputs, documents={"origin": origin})

    def _kill_the_pod(
        self, section: dict[str, Any], origin: dict[str, Any], inputs: dict[str, str], outputs: dict[str, str]
    ) -> None:
        """The same task in a process of its own, killed as soon as it has cloned the repository."""
        given = {"config": section, "documents": {"origin": origin}, "inputs": inputs, "outputs": outputs}
        write_json(self.folder / "given.json", given)
        code = (
            "import json, sys; from clincot.pipelines import tasks; given = json.load(open(sys.argv[1])); "
            "tasks.run_stage_task('version', **given)"
        )
        clone = self.folder / "version.json.clone" / ".dvc"
        with subprocess.Popen([sys.executable, "-c", code, str(self.folder / "given.json")]) as process:
            limit = time.monotonic() + 60
            while not clone.is_dir() and time.monotonic() < limit:
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not Path(outputs["version"]).exists()

    def _decide(self, parameters: dict[str, Any], at: dict[str, Path], champion: str, challenger: Path) -> Decision:
        platform, folder = self.platform, self.folder
        (record,) = read_records(challenger / "record.json", Checkpoint)
        platform.policies[record.round] = record.sha256
        promoted = champion != platform.policies[0]
        inputs = {
            "benchmark": parameters["benchmark"],
            "champion": platform.write_outcomes(folder / "champion.outcomes", champion, right=promoted),
            "challenger": platform.write_outcomes(
                folder / "challenger.outcomes", record.sha256, right=promoted or self.better
            ),
            "data": parameters["data"],
            "panel_report": str(at["panel_report"]),
            "pair_report": str(at["pair_report"]),
        }
        outputs = {name: str(folder / name) for name in ("decision", "evidence", "summary")}
        tasks.decide_with_ledger(parameters["decide"], parameters["publish"], inputs, outputs)
        (decision,) = read_records(folder / "decision", Decision)
        return decision

    def _publish_and_roll_out(self, challenger: Path, decision: Decision, over: str) -> None:
        """What publish stores, and what a rollout does when its traffic has moved."""
        store = self.platform.store
        manifest = register_checkpoint(
            store, challenger, PublishConfig(name=LINE), PublicationEvidence(decision=decision)
        )
        promote_champion(store, manifest, over=over, by="pipeline", reason="rolled out", decision=decision.id)


def test_five_nights(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on the device")

    said = {}
    for night in (
        Night(platform, 1),
        Night(platform, 2, kill_version=True),
        Night(platform, 3, better=True),
        Night(platform, 4, page_fails=True),
        Night(platform, 5),
    ):
        monkeypatch.setattr(round_page, "write_round_page", fail if night.page_fails else lambda *_, **__: None)
        said[night.number] = night.play()
    store, policies = platform.store, platform.policies

    # Every night is a round of its own, also the fourth, whose page fails after the round has ended.
    for number in range(1, 6):
        assert said[number] == f"round {number} of {LINE}: SUCCEEDED"

    # The champion: the base, and since the third night the challenger of that night.
    moves = read_champion(store, LINE).moves
    assert [(move.kind, move.sha256, move.round) for move in moves] == [
        ("base", policies[0], 0),
        ("promote", policies[3], 3),
    ]
    starts = [find_round_start(store, LINE, number) for number in range(1, 6)]
    assert [begun.start.sha256 for begun in starts if begun is not None] == [policies[0]] * 3 + [policies[3]] * 2

    # The records of the rounds.
    keys = [key.removeprefix(f"rounds/{LINE}/") for key in store.keys(f"rounds/{LINE}/")]
    expected = [f"000{number}/{name}.json" for number in range(1, 6) for name in ("begun", "ended", "made")]
    assert sorted(keys) == sorted(expected)
    verdicts = [read_round_outputs(store, LINE, number).verdict for number in range(1, 6)]
    assert verdicts == ["keep", "keep", "promote", "keep", "keep"]
    ends = [find_round_end(store, LINE, number) for number in range(1, 6)]
    assert [(end.run, end.recorded_by) for end in ends if end is not None] == [
        (f"night-{number}", "") for number in range(1, 6)
    ]
    assert find_round_failure(store, LINE, 4) is None

    # The ledger: five challengers of one look each. γ_k = k^-1.6 / ζ(1.6) with ζ(1.6) = 2.28577; challenger k has the
    # level 0.05·γ_k, the fourth has that of the promoted third in addition, and a first look is tested at 0.6 of it.
    spent = tuple(read_records(store.root / f"ledgers/{LINE}/budget.jsonl", BudgetEntry))
    assert [(entry.budget.number, entry.budget.challenger_number, entry.verdict) for entry in spent] == [
        (1, 1, "keep"),
        (2, 2, "keep"),
        (3, 3, "promote"),
        (4, 4, "keep"),
        (5, 5, "keep"),
    ]
    third, fourth = 0.05 * 3**-1.6 / 2.28577, 0.05 * 4**-1.6 / 2.28577
    assert spent[2].budget.level == pytest.approx(0.6 * third, rel=1e-5)
    assert spent[3].budget.level == pytest.approx(0.6 * (fourth + third), rel=1e-5)

    # The versions of the preference data, with the runs that committed them.
    tags = subprocess.run(
        ["git", "-C", str(platform.repository), "tag"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert tags == [f"preferences/{LINE}/round-000{number}" for number in range(1, 6)]

    # What the alerts see.
    state = read_line_state(store, LINE)
    assert (state.ended, state.failed, state.since_promotion, state.champion_round) == (5, False, 2, 3)


def test_a_schedule_that_is_changed_while_a_run_goes_on(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has its parameters from its start. The next one has the new ones, and does the next round."""
    monkeypatch.setattr(round_page, "write_round_page", lambda *_, **__: None)
    before = platform.parameters()
    params = Params.model_validate(
        {
            "publish": {"store": platform.store.url, "name": LINE},
            "version": {"repository": str(platform.repository)},
            "decide": {**DECIDE, "min_gain": 0.2},
        }
    )
    plan = RoundPlan(params=params, data=before["data"], benchmark=before["benchmark"])
    first = Night(platform, 1)
    monkeypatch.setattr(Platform, "parameters", lambda self: before)
    reconcile_recurring_run(connect_pipelines(platform.stub.url), plan, RunSchedule(interval_s=3600))
    assert first.play() == f"round 1 of {LINE}: SUCCEEDED"
    monkeypatch.undo()
    monkeypatch.setattr(round_page, "write_round_page", lambda *_, **__: None)
    after = platform.parameters()
    assert (before["decide"]["min_gain"], after["decide"]["min_gain"]) == (0.0, 0.2)
    assert encode_params(params.decide.model_dump(mode="json")) == after["decide"]
    assert Night(platform, 2).play() == f"round 2 of {LINE}: SUCCEEDED"
    (decision,) = read_records(platform.folder / "night-2" / "decision", Decision)
    assert decision.settings["min_gain"] == 0.2
