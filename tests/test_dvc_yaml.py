"""dvc.yaml says the same as the stage list, and the real `dvc repro` runs what a change touches and no more."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from clincot.cli.app import main
from clincot.config import load_params
from clincot.stages.catalog import STAGES, get_stage
from tests.support import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FILE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())
ROUND = {name: stage for name, stage in FILE["stages"].items() if not name.startswith("render-")}


def test_every_stage_of_a_round_is_there() -> None:
    """Preflight and publish are about a cluster and a store."""
    run = [shlex.split(stage["cmd"])[1] for stage in ROUND.values()]
    named = [stage.name for stage in STAGES if stage.name not in {"preflight", "publish"}]
    assert sorted({*run}, key=named.index) == named
    assert sorted(run) == sorted([*named, "evaluate"])  # of the base too


@pytest.mark.parametrize("name", ROUND)
def test_a_stage_is_the_one_of_the_list(name: str) -> None:
    """Its command gives every input and output, DVC knows each as dependency or output, and its section as params."""
    written = ROUND[name]
    program, command, *rest = shlex.split(written["cmd"])
    stage = get_stage(command)
    assert program == "clincot"
    flags = [flag.removeprefix("--").replace("-", "_") for flag in rest[::2]]
    given = dict(zip(flags, rest[1::2], strict=True))
    assert {*stage.inputs, *stage.outputs} <= {*given} <= {*stage.inputs, *stage.optional, *stage.outputs}
    named = [str(path.relative_to(ROOT)) for path in getattr(load_params(ROOT / "params.yaml"), command).files]
    assert written["deps"] == [path for flag, path in given.items() if flag not in stage.outputs] + named
    made = [*written["outs"], *written.get("metrics", [])]
    assert sorted(made) == sorted(given[output] for output in stage.outputs)
    loads_models = "dtype" in stage.config.model_fields and command != "train"
    assert written["params"] == [command, *(["models"] if loads_models else [])]


def test_the_benchmark_is_looked_at_with_the_grounders_of_the_round() -> None:
    """`clincot rounds` takes the round's settings for it; dvc.yaml reads them from params.yaml."""
    params = load_params(ROOT / "params.yaml")
    assert params.evaluate.propose == params.propose


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """The repository's dvc.yaml over the smallest models and data there are; nothing is rendered."""
    content = {**FILE, "stages": ROUND}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False, width=1000))
    judges = [tiny.write_model(tmp_path / "assets" / name, seed) for seed, name in ((1, "judge-a"), (2, "judge-b"))]
    tiny.write_model(tmp_path / "assets" / "policy", 0)
    (tmp_path / "assets" / "calibration.jsonl").write_text("")
    relative = [judge.relative_to(tmp_path) for judge in judges]
    params = tiny.params(relative, evaluate={"arms": ["written"], "max_new_tokens": 2})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    tiny.write_set(tmp_path / "runs" / "dvc" / "data", studies=3, key=False)
    tiny.write_set(tmp_path / "runs" / "dvc" / "benchmark", seed=1, studies=2)
    dvc(tmp_path, "init", "--no-scm")
    dvc(tmp_path, "config", "core.analytics", "false")
    return tmp_path


def dvc(folder: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "DVC_NO_ANALYTICS": "1",
        "CI": "1",
        "DVC_SITE_CACHE_DIR": str(folder / "site"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}",
    }
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def ran(folder: Path) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", dvc(folder, "repro"))


def test_dvc_runs_what_a_change_touches_and_no_more(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round is made in this process, which has loaded everything already, and given to DVC as if it had run it."""
    monkeypatch.chdir(workshop)
    variables = {"folder": "runs/dvc", "policy": "assets/policy"}
    for stage in ROUND.values():
        command = stage["cmd"]
        for name, value in variables.items():
            command = command.replace(f"${{{name}}}", value)
        assert main(shlex.split(command)[1:]) == 0
    dvc(workshop, "commit", "--force")
    assert ran(workshop) == []
    params = yaml.safe_load((workshop / "params.yaml").read_text())
    params["train"]["lr"] = 0.002
    (workshop / "params.yaml").write_text(yaml.safe_dump(params))
    assert ran(workshop) == ["train", "evaluate", "decide"]
    assert ran(workshop) == []
