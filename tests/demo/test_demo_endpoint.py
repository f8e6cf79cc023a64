"""The demo ends in an endpoint: the lines it tells were run, whoever is champion answers, nothing is left running."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from clincot.demo.demo_endpoint import MODEL_NAME, run_endpoint_demo
from clincot.demo.walkthrough import NEXT_STEPS, main, plan_radiograph_rounds
from clincot.deployment.deployment import start_rollout
from clincot.deployment.journal import iter_journals, read_last_journal
from clincot.jsonl import write_json, write_records
from clincot.judging.agreement import KrippendorffAlpha
from clincot.judging.combination import PanelReport
from clincot.models.checkpoint import hash_checkpoint
from clincot.records import BenchmarkReport, Checkpoint
from clincot.registry import champion
from clincot.registry.manifest import read_manifest
from clincot.rounds import Plan
from clincot.storage.folder_store import FolderStore
from tests.serving.conftest import POLICY
from tests.support import tiny
from tests.support.deployment_builders import decided

pytestmark = pytest.mark.slow


def report(policy: Path) -> dict[str, object]:
    measured = BenchmarkReport(benchmark="b" * 64, policy=hash_checkpoint(policy), protocol="strict", metrics={})
    return measured.model_dump(mode="json")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A run whose rounds promoted nobody."""
    run = tmp_path / "run"
    films = tiny.write_set(tmp_path / "benchmark", studies=8)
    (run / "base").mkdir(parents=True)
    write_json(run / "base" / "report.json", report(POLICY))
    write_json(run / "champion.json", {"round": 0, "policy": str(POLICY), "promotions": []})
    return Plan(run, films, films, POLICY, tiny.params([]), 1)


def promote(plan: Plan) -> str:
    """Round 1 made another policy, which was promoted: the base with its embeddings a little larger."""
    folder = plan.run / "round-01"
    shutil.copytree(POLICY, folder / "policy")
    weights = load_file(folder / "policy" / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[name] = weights[name] * 1.01
    save_file(weights, folder / "policy" / "model.safetensors", metadata={"format": "pt"})
    base, digest = hash_checkpoint(POLICY), hash_checkpoint(folder / "policy")
    record = Checkpoint(uri=str(folder / "policy"), sha256=digest, parent=base, pairs="pairs", config="config")
    write_records(folder / "policy" / "record.json", [record])
    write_json(folder / "report.json", report(folder / "policy"))
    decision = decided(base, digest)
    write_records(folder / "decision.json", [decision])
    alpha = KrippendorffAlpha(value=0.5, units=10)
    panel = PanelReport(
        quorum=1,
        candidates=10,
        scored=10,
        unscored={},
        judges=(),
        alpha_raw=alpha,
        alpha_calibrated=alpha,
        mean_spread=0.1,
    )
    write_json(folder / "panel.report.json", panel.model_dump(mode="json"))
    promotions = [{"round": 1, "decision": decision.id}]
    write_json(plan.run / "champion.json", {"round": 1, "policy": str(folder / "policy"), "promotions": promotions})
    return digest


def left_running(run: Path) -> list[list[str]]:
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if any(str(run) in word for word in line)]


def test_base_then_a_rollout_that_was_interrupted_then_the_promoted_challenger(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2] / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first = run_endpoint_demo(plan)
    store = FolderStore(plan.run / "store")
    base = read_manifest(store, MODEL_NAME, hash_checkpoint(POLICY))
    assert champion.read_champion(store, MODEL_NAME).now.sha256 == base.sha256
    assert first.answer["answer"] == base.golden[0].answer
    assert first.answer["policy"] == base.sha256
    told = first.render_text()
    assert all(f"$ {line}" in told for line in (first.serve, first.deploy, first.ask, first.stop))
    assert "curl" in first.ask
    assert left_running(plan.run) == []

    start_rollout(store, base, plan.params.deploy, target="local", service=None, by="demo")  # and killed there
    digest = promote(plan)
    second = run_endpoint_demo(plan)
    assert second.answer["policy"] == digest == champion.read_champion(store, MODEL_NAME).now.sha256
    ends = [(journal.plan.sha256, journal.last.kind) for journal in iter_journals(store, MODEL_NAME)]
    assert ends == [(base.sha256, kind) for kind in ("finished", "abandoned", "finished")] + [(digest, "finished")]
    assert read_last_journal(store, MODEL_NAME) is not None
    assert left_running(plan.run) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(second.ask.rpartition(" ")[2], timeout=10)


def test_without_the_server_the_demo_says_so_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kserve", None)
    assert main(["--run", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "pip install 'clincot[serve]'" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_hints_at_the_end_need_no_repository() -> None:
    """They are for someone who installed the package: `clincot …`, shipped models, no Makefile and no .venv."""
    text = NEXT_STEPS.format(pair="pair-1a2b", run="runs/demo", data="data", benchmark="benchmark")
    commands = [line[22:] for line in text.splitlines() if line.startswith("  ") and not line.startswith("     ")]
    assert len(commands) == 4
    assert all(command.startswith("clincot ") for command in commands)
    assert not [word for word in (".venv", "make ", "assets/") if word in text]
    assert "--recipe small-model" in text


@pytest.mark.parametrize("short", [True, False])
def test_the_demo_is_the_small_models_recipe(short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from the number of rounds, and near-duplicates: all rendered films are of one anatomy."""
    monkeypatch.setattr("clincot.demo.walkthrough.render_dataset", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    plan = plan_radiograph_rounds(tmp_path / "run", short=short)
    assert plan.params.recipe.name == "small-model"
    assert plan.params.recipe.changed == ("prepare.rounds", "decide.max_near_duplicates")
    assert plan.policy == POLICY
