"""Every example runs, on small data."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from clincot.config import load_params, resolve_path
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.generation.http_grounder import HttpGrounder
from clincot.jsonl import read_json_model
from clincot.models.protocols import GroundingQuery
from clincot.records import Decision
from tests.support import tiny
from tests.support.model_servers import serving
from tests.support.runs import write_films, write_run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run_example(*words: str, **environment: str) -> str:
    """Run a command in the repository's root, and return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_has_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in sorted(EXAMPLES.iterdir()) if path.is_file() and path.name not in source] == []


@pytest.mark.slow
def test_round(tmp_path: Path) -> None:
    """01_round.sh, on data sets that exist, so that nothing is rendered."""
    settings = [
        "prepare.rounds=1",
        "propose.grounders={windows: 1, random: 2}",
        "evaluate.arms=[written, whole]",
        "decide.arm=written",
        "pair.min_agreement=0",  # too few answers to measure it
        "evaluate.resamples=20",
        "decide.resamples=20",
        "pair.min_gap=0.001",
        "pair.length_auc_tolerance=0.5",
    ]
    options = [word for setting in settings for word in ("--set", setting)]
    printed = run_example(
        "examples/01_round.sh",
        *options,
        RUN=str(tmp_path / "run"),
        DATA=str(tiny.write_set(tmp_path / "data")),
        BENCHMARK=str(tiny.write_set(tmp_path / "benchmark", seed=1)),
    )
    decision = read_json_model(tmp_path / "run" / "round-01" / "decision.json", Decision)
    assert decision.verdict in ("keep", "blocked")  # twelve questions show no gain
    assert (tmp_path / "run" / "pair.png").is_file()
    assert "pair-" in printed


def test_own_data(tmp_path: Path) -> None:
    """02_own_data.py: no patient is in both splits."""
    out = tmp_path / "mine"
    printed = run_example(sys.executable, "examples/02_own_data.py", "--out", str(out), "--patients", "20")
    studies = {split: StudyIndex(out / split) for split in ("train", "test")}
    patients = {split: {index[study].patient for study in index} for split, index in studies.items()}
    assert len(studies["train"]) + len(studies["test"]) == 40
    assert patients["train"].isdisjoint(patients["test"])
    assert "blind" in printed


@contextlib.contextmanager
def start_process(*words: str) -> Iterator[str]:
    """Start a command that prints its address first; yield the address, and stop it."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_http_grounder(tmp_path: Path) -> None:
    """03_http_grounder.py: the service and the package's client understand each other, and the square is found."""
    data = tiny.write_set(tmp_path / "data")
    question, studies = next(iter(load_questions(data))), StudyIndex(data)
    query = GroundingQuery(studies[question.study], question, ("nodule",))
    with start_process(sys.executable, "examples/03_http_grounder.py", "--port", "0") as url:
        (found,) = HttpGrounder(url).ground([query], data)
    assert [region.hypothesis for region in found] == ["nodule"]
    assert found[0].box.x1 - found[0].box.x0 == pytest.approx(0.25)


def test_vllm_judge() -> None:
    """04_vllm_judge.yaml: the parameters load; keys are named, not written."""
    params = load_params(EXAMPLES / "04_vllm_judge.yaml")
    assert [judge.name for judge in params.judge.judges] == ["med-a", "med-b"]
    assert all(judge.url.endswith("/v1") and judge.model for judge in params.judge.judges)
    assert params.train.lr == 1e-6


@pytest.mark.slow
def test_query_endpoint(tmp_path: Path, films: Path) -> None:
    """05_query_endpoint.py, against a server with the shipped policy."""
    image, question = films / "images" / "0.png", "Is there a nodule?"
    with serving(tmp_path / "log", "--checkpoint", str(resolve_path("shipped:policy"))) as server:
        server.wait_ready()
        command = [sys.executable, "examples/05_query_endpoint.py", str(image), question, "--url", server.url]
        printed = run_example(*command)
    assert "confidence" in printed
    assert sum(line.startswith("*") for line in printed.splitlines()) == 1


def run_notebook(path: Path, environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Execute the code cells of a notebook in order; return its variables."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    variables: dict[str, object] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(path), "exec"), variables)
    return variables


def test_inspect_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """06_inspect_pairs.ipynb, on a small run; the notebook is committed without outputs."""
    run = tmp_path / "run"
    write_films(tmp_path / "data", films=40, seed=1, split="train")
    write_films(tmp_path / "benchmark", films=20, seed=2, split="test")
    write_run(run, tmp_path / "data", tmp_path / "benchmark", rounds=1)
    path = EXAMPLES / "06_inspect_pairs.ipynb"
    variables = run_notebook(path, {"CLINCOT_RUN": str(run)}, monkeypatch)
    printed = capsys.readouterr().out
    pairs = variables["pairs"]
    assert isinstance(pairs, list)
    assert f"{len(pairs)} pairs" in printed
    assert "chosen" in printed
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs")] == []
