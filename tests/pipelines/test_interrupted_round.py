"""The tasks around a round: what they record, refuse and say. tests/runs/test_history.py has every transition."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from clincot.config import PreflightConfig, PublishConfig
from clincot.jsonl import write_json, write_records
from clincot.judging.calibration import make_identity_calibration
from clincot.judging.combination import PanelMember, ScoreCombiner
from clincot.pipelines import round_page, tasks
from clincot.pipelines.params import encode_params
from clincot.pipelines.round_files import RoundContext, RoundFiles
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.run_form import RunForm
from clincot.pipelines.run_settings import read_task_settings, write_settings
from clincot.records import Decision, StartingPolicy
from clincot.registry.champion import create_champion_pointer, promote_champion
from clincot.registry.manifest import Manifest
from clincot.runs.round_records import next_round_number, read_round_outputs
from clincot.storage.artifacts import STALE_DOWNLOAD_S, get_cache_folder
from clincot.storage.digests import hash_path
from clincot.storage.folder_store import FolderStore
from tests.support.deployment_builders import LINE, decided, published

NAMES = tuple(RoundFiles.__dataclass_fields__)
DIGEST = "c" * 64


@dataclass(frozen=True)
class ModelLine:
    """A model with a champion, a challenger that was published after a promotion, and a store."""

    folder: Path
    store: FolderStore
    base: Manifest
    challenger: Manifest
    decision: Decision

    @property
    def publish(self) -> dict[str, Any]:
        return encode_params(PublishConfig(store=self.store.url, name=LINE).model_dump(mode="json"))

    @property
    def page_settings(self) -> str:
        """Address of the settings of the page."""
        return write_settings(self.store.url, {"publish": self.publish}, {})

    def found_by_preflight(self, champion: Manifest) -> str:
        """The policy from which a round would start, as preflight hands it on."""
        start = StartingPolicy(
            line=LINE,
            uri=champion.uri,
            sha256=champion.sha256,
            round=champion.round,
            source="champion",
            published=True,
        )
        return start.model_dump_json()

    def stored(self) -> list[Path]:
        """All files of the store."""
        return sorted((self.folder / "store").rglob("*"))

    def promote(self) -> None:
        promote_champion(
            self.store,
            self.challenger,
            over=self.base.sha256,
            by="pipeline",
            reason="better",
            decision=self.decision.id,
        )


@pytest.fixture
def line(tmp_path: Path) -> ModelLine:
    store = FolderStore(tmp_path / "store")
    base = published(store, tmp_path, 1.0)
    challenger = published(store, tmp_path, 2.0, over=base)
    create_champion_pointer(store, base, by="ann")
    return ModelLine(tmp_path, store, base, challenger, decided(base.measured, challenger.measured))


@pytest.fixture
def files(line: ModelLine) -> RoundFiles:
    """The files of a round; only the decision and the report of the panel are read."""
    paths = {name: line.folder / name for name in NAMES}
    for name, path in paths.items():
        path.write_text(name, encoding="utf-8")
    write_records(paths["decision"], [line.decision])
    panel = ScoreCombiner([PanelMember("judge-a", 1.0, make_identity_calibration("a" * 64))], quorum=1)
    write_json(paths["panel_report"], panel.build_report().model_dump(mode="json"))
    return RoundFiles(**{name: str(path) for name, path in paths.items()})


@pytest.fixture
def context() -> RoundContext:
    return RoundContext(1, "policy", "checkpoint", "champion-results")


def test_a_failed_page_does_not_lose_the_round(
    line: ModelLine,
    files: RoundFiles,
    context: RoundContext,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The challenger is promoted, then the page fails. The round has all it needs: the next run ends it and goes on."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on the device")

    first = tasks.start_round(line.publish, line.found_by_preflight(line.base), number=0, run_id="one")
    assert (first.policy_digest, first.number) == (line.base.sha256, 1)
    tasks.record_round(line.publish, files, number=1, checkpoint_digest=DIGEST, run_id="one")
    line.promote()
    monkeypatch.setattr(round_page, "write_round_page", fail)
    with pytest.raises(SystemExit, match="clincot page: no space left on the device"):
        tasks.page(line.page_settings, context, files, page="page.html", results="results.md", questions="questions")
    tasks.record_run_status(line.publish, state="FAILED", run_id="one", error="page")

    following = tasks.start_round(line.publish, line.found_by_preflight(line.challenger), number=0, run_id="two")
    assert (following.policy_digest, following.number) == (line.challenger.sha256, 2)
    assert f"round 1 of {LINE} is complete (promote; the champion was moved)" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["COMPLETE", "RUNNING", "CACHED", "SUCCEEDED", "FAILED"])
def test_three_nightly_runs_are_three_rounds(line: ModelLine, files: RoundFiles, state: str) -> None:
    """Kubeflow Pipelines 2.17.0 gives the exit task of a successful run COMPLETE, or RUNNING if its tail was cached."""
    champion = line.found_by_preflight(line.base)
    for night in (1, 2, 3):
        run = f"night-{night}"
        assert tasks.start_round(line.publish, champion, number=0, run_id=run).number == night
        tasks.record_round(line.publish, files, number=night, checkpoint_digest=DIGEST, run_id=run)
        tasks.end_round(line.publish, run_id=run, rounds=1)
        said = tasks.record_run_status(line.publish, state=state, run_id=run, error="")
        assert said == f"round {night} of {LINE}: SUCCEEDED"
    names = {path.name for path in line.stored() if path.parent.name.startswith("000")}
    assert names == {"begun.json", "made.json", "ended.json"}
    assert next_round_number(line.store, LINE) == 4


@pytest.mark.parametrize("state", ["COMPLETE", "RUNNING", "CACHED", "SUCCEEDED"])
def test_a_failure_is_recorded_under_any_state(line: ModelLine, files: RoundFiles, state: str) -> None:
    """A run that failed in decide is reported as RUNNING. Its round has no end, so it failed."""
    champion = line.found_by_preflight(line.base)
    tasks.start_round(line.publish, champion, number=0, run_id="one")
    tasks.record_round(line.publish, files, number=1, checkpoint_digest=DIGEST, run_id="one")
    said = tasks.record_run_status(line.publish, state=state, run_id="one", error="")
    assert said == (
        f"round 1 of {LINE}: FAILED (Kubeflow Pipelines reports {state}): no error was passed on; the last record of "
        "the run is that of record_round. `clincot pipeline status one` names the task"
    )
    assert tasks.start_round(line.publish, champion, number=0, run_id="two").number == 1


def test_what_became_of_the_run_before_is_said(
    line: ModelLine, files: RoundFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminated run never reaches its exit task, so only the missing end shows that its round is open."""
    tasks.start_round(line.publish, line.found_by_preflight(line.base), number=0, run_id="one")
    assert capsys.readouterr().out == f"round 1 of {LINE} starts from {line.base.uri}\n"
    tasks.start_round(line.publish, line.found_by_preflight(line.base), number=0, run_id="two")
    begun = f"round 1 of {LINE} was begun by the run one and has not ended, nor recorded a failure"
    lost = "so it was terminated, was lost or still runs"
    assert f"{begun}, {lost}: this run resumes it from {line.base.uri}" in capsys.readouterr().out
    tasks.start_round(line.publish, line.found_by_preflight(line.challenger), number=0, run_id="three")
    assert f"so this run begins it again from {line.challenger.uri}" in capsys.readouterr().out
    tasks.record_round(line.publish, files, number=1, checkpoint_digest=DIGEST, run_id="three")
    tasks.end_round(line.publish, run_id="three", rounds=1)
    assert "ended by the run three" in tasks.record_run_status(line.publish, state="RUNNING", run_id="one", error="")
    capsys.readouterr()
    tasks.start_round(line.publish, line.found_by_preflight(line.challenger), number=0, run_id="four")
    assert "has not ended" not in capsys.readouterr().out
    tasks.start_round(line.publish, line.found_by_preflight(line.challenger), number=1, run_id="five")
    assert "was ended by the run three; this run was asked for it and repeats it" in capsys.readouterr().out


def test_a_run_that_others_overtook_stops_before_the_promotion(
    line: ModelLine, files: RoundFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task of the record fails, and the page and the promotion depend on it."""
    for run in ("one", "two"):
        tasks.start_round(line.publish, line.found_by_preflight(line.base), number=0, run_id=run)
    tasks.record_round(line.publish, files, number=1, checkpoint_digest=DIGEST, run_id="one")
    line.promote()
    tasks.record_round(line.publish, files, number=1, checkpoint_digest=DIGEST, run_id="two")
    assert "the run one has recorded the same outputs already" in capsys.readouterr().out
    Path(files.pairs).write_text("others", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"clincot record_round: .* was decided by the run one \(promote, "):
        tasks.record_round(line.publish, files, number=1, checkpoint_digest=DIGEST, run_id="two")


def test_a_run_without_a_round_cannot_end_one(line: ModelLine) -> None:
    with pytest.raises(SystemExit, match=r"clincot end_round: .*runs/\S+/one\.json does not exist"):
        tasks.end_round(line.publish, run_id="one", rounds=1)


def test_without_the_record_the_round_starts_anew(line: ModelLine) -> None:
    """Why record_round comes before the promotion: the pointer alone does not tell who moved it."""
    tasks.start_round(line.publish, line.found_by_preflight(line.base), number=0, run_id="one")
    line.promote()
    again = tasks.start_round(line.publish, line.found_by_preflight(line.challenger), number=0, run_id="two")
    assert (again.policy_digest, again.number) == (line.challenger.sha256, 1)


def test_the_record_holds_digests_and_decision(line: ModelLine, files: RoundFiles) -> None:
    tasks.start_round(line.publish, line.found_by_preflight(line.base), number=4, run_id="one")
    tasks.record_round(line.publish, files, number=4, checkpoint_digest=DIGEST, run_id="one")
    record = read_round_outputs(line.store, LINE, 4)
    assert list(record.digests) == sorted({*NAMES, "checkpoint"})
    assert record.digests["checkpoint"] == DIGEST
    assert record.digests["pairs"] == hash_path(Path(files.pairs))
    assert (record.decision, record.verdict) == (line.decision.id, "promote")
    assert (record.run, record.start) == ("one", line.base.sha256)


def test_the_page_changes_nothing_in_the_store(
    line: ModelLine, files: RoundFiles, context: RoundContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[RoundContext] = []
    assert line.page_settings  # stored by preflight
    monkeypatch.setattr(round_page, "write_round_page", lambda _, context, *__, **___: rendered.append(context))
    before = line.stored()
    tasks.page(line.page_settings, context, files, page="page.html", results="results.md", questions="questions")
    assert rendered == [context]
    assert line.stored() == before


@pytest.fixture
def form(line: ModelLine) -> RunForm:
    data = line.folder / "data"
    data.mkdir()
    (data / "questions.jsonl").write_text("", encoding="utf-8")
    return RunForm(str(data), str(data), line.store.url, LINE, base="", questions=0)


def form_sections() -> dict[str, Any]:
    return {name: dict(value) for name, value in RoundPlan().arguments.items() if isinstance(value, dict)}


def test_preflight_starts_no_round(line: ModelLine, form: RunForm, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all checks pass, it stores the settings of the tasks, under their digests, and nothing else."""
    start = line.found_by_preflight(line.base)
    checked_configs = []

    def check(stage: str, config: object, inputs: object, outputs: dict[str, str], **_: object) -> str:
        checked_configs.append(config)
        Path(outputs["champion"]).write_text(start + "\n", encoding="utf-8")
        return "digest"

    monkeypatch.setattr(tasks, "run_stage_task", check)
    before = {*line.stored()}
    checked = tasks.preflight(form, form_sections(), {"table": str(line.folder / "table")})
    assert checked.champion == start
    new = [path for path in line.stored() if path not in before and path.is_file()]
    assert {path.parent.name for path in new} == {"settings"}
    assert {path.stem for path in new} == {hashlib.sha256(path.read_bytes()).hexdigest() for path in new}
    settings = read_task_settings(checked.evaluate_settings)
    assert settings.inputs["data_digest"] == settings.inputs["benchmark_digest"] == hash_path(Path(form.data))
    (config,) = checked_configs
    assert isinstance(config, PreflightConfig)
    assert (config.data, config.benchmark, config.publish.store) == (form.data, form.benchmark, form.store)


def test_everything_wrong_with_the_form_is_in_one_table(line: ModelLine, form: RunForm) -> None:
    """Before anything else is checked: every section with its wrong key, and every required field left empty."""
    sections = form_sections()
    sections["decide"]["min_gian"] = 1
    sections["publish"]["store"] = "elsewhere"
    table = line.folder / "table"
    before = line.stored()
    with pytest.raises(SystemExit, match="3 of 3 checks failed"):
        tasks.preflight(replace(form, benchmark=""), sections, {"table": str(table)})
    shown = table.read_text(encoding="utf-8")
    for told in ("the parameter benchmark of the run", "min_gian", "contains `store`, which is the parameter `store`"):
        assert told in shown
    assert line.stored() == before


def test_the_status_task_only_records(line: ModelLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Abandoned downloads of the cache are not its business."""
    monkeypatch.setenv("CLINCOT_CACHE", str(line.folder / "cache"))
    abandoned = get_cache_folder() / ".fetching-old"
    abandoned.mkdir(parents=True)
    os.utime(abandoned, (0, abandoned.stat().st_mtime - 2 * STALE_DOWNLOAD_S))
    tasks.start_round(line.publish, line.found_by_preflight(line.base), number=0, run_id="one")
    said = tasks.record_run_status(line.publish, state="FAILED", run_id="one", error="judge: HTTP 401")
    assert said == f"round 1 of {LINE}: FAILED: judge: HTTP 401"
    assert abandoned.is_dir()


def test_without_a_store_nothing_is_recorded(line: ModelLine, files: RoundFiles) -> None:
    publish = encode_params(PublishConfig().model_dump(mode="json"))
    origin = tasks.start_round(publish, line.found_by_preflight(line.base), number=0, run_id="one")
    assert origin == (line.base.uri, line.base.sha256, 0, 1)
    tasks.record_round(publish, files, number=1, checkpoint_digest=DIGEST, run_id="one")
    assert "nothing is recorded" in tasks.end_round(publish, run_id="one", rounds=1)
    assert "nothing is recorded" in tasks.record_run_status(publish, state="FAILED", run_id="one", error="")
