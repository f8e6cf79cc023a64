"""A round whose run fails after the promotion is resumed by the next run, from where it first started."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clincot.config import PublishConfig
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
from clincot.runs import history
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
    line: ModelLine, files: RoundFiles, context: RoundContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The challenger is promoted, then the page fails. The retry finds another champion, and resumes all the same."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on the device")

    first = tasks.start_round(line.publish, line.found_by_preflight(line.base), number=0, run_id="one")
    assert (first.policy_digest, first.number) == (line.base.sha256, 1)
    tasks.record_round(line.publish, files, number=1, checkpoint_digest=DIGEST)
    line.promote()
    monkeypatch.setattr(round_page, "write_round_page", fail)
    with pytest.raises(SystemExit, match="clincot page: no space left on the device"):
        tasks.page(line.page_settings, context, files, page="page.html", results="results.md")
    tasks.record_run_status(line.publish, state="FAILED", run_id="one", error="page")

    again = tasks.start_round(line.publish, line.found_by_preflight(line.challenger), number=0, run_id="two")
    assert again == first
    assert tasks.end_round(line.publish, run_id="two", rounds=1) == f"round 1 of {LINE}: SUCCEEDED"
    tasks.record_run_status(line.publish, state="COMPLETE", run_id="two", error="")
    following = tasks.start_round(line.publish, line.found_by_preflight(line.challenger), number=0, run_id="three")
    assert (following.policy_digest, following.number) == (line.challenger.sha256, 2)


@pytest.mark.parametrize("state", ["COMPLETE", "RUNNING", "CACHED", "SUCCEEDED", "FAILED"])
def test_three_nightly_runs_are_three_rounds(line: ModelLine, files: RoundFiles, state: str) -> None:
    """Kubeflow Pipelines 2.17.0 gives the exit task of a successful run COMPLETE, or RUNNING if its tail was cached."""
    champion = line.found_by_preflight(line.base)
    for night in (1, 2, 3):
        run = f"night-{night}"
        assert tasks.start_round(line.publish, champion, number=0, run_id=run).number == night
        tasks.record_round(line.publish, files, number=night, checkpoint_digest=DIGEST)
        tasks.end_round(line.publish, run_id=run, rounds=1)
        said = tasks.record_run_status(line.publish, state=state, run_id=run, error="")
        assert said == f"round {night} of {LINE}: SUCCEEDED"
    names = {path.name for path in line.stored() if path.parent.name.startswith("000")}
    assert names == {"begun.json", "made.json", "ended.json"}
    assert history.next_round_number(line.store, LINE) == 4


@pytest.mark.parametrize("state", ["COMPLETE", "RUNNING", "CACHED", "SUCCEEDED"])
def test_a_failure_is_recorded_under_any_state(line: ModelLine, files: RoundFiles, state: str) -> None:
    """A run that failed in decide is reported as RUNNING. Its round has no end, so it failed."""
    champion = line.found_by_preflight(line.base)
    tasks.start_round(line.publish, champion, number=0, run_id="one")
    tasks.record_round(line.publish, files, number=1, checkpoint_digest=DIGEST)
    said = tasks.record_run_status(line.publish, state=state, run_id="one", error="")
    assert said == f"round 1 of {LINE}: FAILED (Kubeflow Pipelines reports {state})"
    assert tasks.start_round(line.publish, champion, number=0, run_id="two").number == 1


def test_a_resumed_round_is_announced(line: ModelLine, files: RoundFiles, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminated run never reaches its exit task, so only the missing end shows that its round is open."""
    tasks.start_round(line.publish, line.found_by_preflight(line.base), number=0, run_id="one")
    assert "has not ended" not in capsys.readouterr().out
    tasks.start_round(line.publish, line.found_by_preflight(line.base), number=0, run_id="two")
    begun = f"round 1 of {LINE} began in an earlier run and has not ended"
    assert f"{begun}: this run resumes it from {line.base.uri}" in capsys.readouterr().out
    tasks.start_round(line.publish, line.found_by_preflight(line.challenger), number=0, run_id="three")
    assert f"so this run begins it again from {line.challenger.uri}" in capsys.readouterr().out
    tasks.record_round(line.publish, files, number=1, checkpoint_digest=DIGEST)
    tasks.end_round(line.publish, run_id="three", rounds=1)
    assert "ended by the run three" in tasks.record_run_status(line.publish, state="RUNNING", run_id="one", error="")
    capsys.readouterr()
    tasks.start_round(line.publish, line.found_by_preflight(line.challenger), number=0, run_id="four")
    assert "has not ended" not in capsys.readouterr().out


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
    tasks.record_round(line.publish, files, number=4, checkpoint_digest=DIGEST)
    record = history.read_round_outputs(line.store, LINE, 4)
    assert list(record.digests) == sorted({*NAMES, "checkpoint"})
    assert record.digests["checkpoint"] == DIGEST
    assert record.digests["pairs"] == hash_path(Path(files.pairs))
    assert (record.decision, record.verdict) == (line.decision.id, "promote")


def test_the_page_changes_nothing_in_the_store(
    line: ModelLine, files: RoundFiles, context: RoundContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[RoundContext] = []
    assert line.page_settings  # stored by preflight
    monkeypatch.setattr(round_page, "write_round_page", lambda _, context, *__, **___: rendered.append(context))
    before = line.stored()
    tasks.page(line.page_settings, context, files, page="page.html", results="results.md")
    assert rendered == [context]
    assert line.stored() == before


def test_preflight_starts_no_round(line: ModelLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all checks pass, it stores the settings of the tasks, under their digests, and nothing else."""
    data = line.folder / "data"
    data.mkdir()
    (data / "questions.jsonl").write_text("", encoding="utf-8")
    sections = {name: value for name, value in RoundPlan().arguments.items() if isinstance(value, dict)}
    form = RunForm(str(data), str(data), line.store.url, LINE, base="", questions=0)
    start = line.found_by_preflight(line.base)

    def check(stage: str, config: object, inputs: object, outputs: dict[str, str], **_: object) -> str:
        Path(outputs["champion"]).write_text(start + "\n", encoding="utf-8")
        return "digest"

    monkeypatch.setattr(tasks, "run_stage_task", check)
    before = {*line.stored()}
    checked = tasks.preflight(form, sections, {"table": str(line.folder / "table")})
    assert checked.champion == start
    new = [path for path in line.stored() if path not in before and path.is_file()]
    assert {path.parent.name for path in new} == {"settings"}
    assert {path.stem for path in new} == {hashlib.sha256(path.read_bytes()).hexdigest() for path in new}
    settings = read_task_settings(checked.evaluate_settings)
    assert settings.inputs["data_digest"] == settings.inputs["benchmark_digest"] == hash_path(data)


def test_the_status_task_only_records(line: ModelLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Abandoned downloads of the cache are not its business."""
    monkeypatch.setenv("CLINCOT_CACHE", str(line.folder / "cache"))
    abandoned = get_cache_folder() / ".fetching-old"
    abandoned.mkdir(parents=True)
    os.utime(abandoned, (0, abandoned.stat().st_mtime - 2 * STALE_DOWNLOAD_S))
    tasks.start_round(line.publish, line.found_by_preflight(line.base), number=0, run_id="one")
    assert tasks.record_run_status(line.publish, state="FAILED", run_id="one", error="") == f"round 1 of {LINE}: FAILED"
    assert abandoned.is_dir()


def test_without_a_store_nothing_is_recorded(line: ModelLine, files: RoundFiles) -> None:
    publish = encode_params(PublishConfig().model_dump(mode="json"))
    origin = tasks.start_round(publish, line.found_by_preflight(line.base), number=0, run_id="one")
    assert origin == (line.base.uri, line.base.sha256, 0, 1)
    tasks.record_round(publish, files, number=1, checkpoint_digest=DIGEST)
    assert "nothing is recorded" in tasks.end_round(publish, run_id="one", rounds=1)
    assert "nothing is recorded" in tasks.record_run_status(publish, state="FAILED", run_id="one", error="")
