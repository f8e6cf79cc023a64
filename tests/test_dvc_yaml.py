"""dvc.yaml says the same as the stage list, and the real `dvc repro` runs what a change touches and no more."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
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
STAGES_OF_LIST = {name: stage for name, stage in ROUND.items() if name != "figures"}  # that one reads the others' files


def test_every_stage_of_a_round_is_there() -> None:
    """Preflight and publish are about a cluster and a store."""
    run = [shlex.split(stage["cmd"])[1] for stage in STAGES_OF_LIST.values()]
    named = [stage.name for stage in STAGES if stage.name not in {"preflight", "publish"}]
    assert sorted({*run}, key=named.index) == named
    assert sorted(run) == sorted([*named, "evaluate"])  # of the base too


@pytest.mark.parametrize("name", STAGES_OF_LIST)
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
    assert sorted(written["outs"]) == sorted(given[output] for output in stage.outputs)
    loads_models = "dtype" in stage.config.model_fields and command != "train"
    assert written["params"] == [command, *(["models"] if loads_models else [])]


def test_the_benchmark_is_looked_at_with_the_grounders_of_the_round() -> None:
    """`clincot rounds` takes the round's settings for it; dvc.yaml reads them from params.yaml."""
    params = load_params(ROOT / "params.yaml")
    assert params.evaluate.propose == params.propose


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's dvc.yaml over the smallest models and data there are; nothing is rendered."""
    tmp_path = tmp_path_factory.mktemp("workshop")
    content = {**FILE, "stages": ROUND}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False, width=1000))
    judges = [tiny.write_model(tmp_path / "assets" / name, seed) for seed, name in ((1, "judge-a"), (2, "judge-b"))]
    tiny.write_model(tmp_path / "assets" / "policy", 0)
    (tmp_path / "assets" / "calibration.jsonl").write_text("")
    relative = [judge.relative_to(tmp_path) for judge in judges]
    decide = {"resamples": 20, "min_alpha": -1.0, "max_off_format": 1.0}  # untrained models are compared all the same
    params = tiny.params(relative, evaluate={"arms": ["written"], "max_new_tokens": 2}, decide=decide)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    tiny.write_set(tmp_path / "runs" / "dvc" / "data", studies=3, key=False)
    tiny.write_set(tmp_path / "runs" / "dvc" / "benchmark", seed=1, studies=8)
    for arguments in (("init", "--quiet"), ("config", "user.name", "test"), ("config", "user.email", "t@localhost")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    dvc(tmp_path, "init", "--quiet")
    dvc(tmp_path, "config", "core.analytics", "false")
    (tmp_path / ".gitignore").write_text("/site\n/assets\n/runs/dvc/data\n/runs/dvc/benchmark\n")
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


@pytest.fixture(scope="module")
def made_once(workshop: Path) -> Path:
    """The round is made in this process, which has loaded everything already, and given to DVC as if it had run it."""
    variables = {"folder": "runs/dvc", "policy": "assets/policy"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        for stage in ROUND.values():
            command = stage["cmd"]
            for name, value in variables.items():
                command = command.replace(f"${{{name}}}", value)
            assert main(shlex.split(command)[1:]) == 0
    dvc(workshop, "commit", "--force")
    subprocess.run(["git", "add", "--all"], cwd=workshop, check=True)
    subprocess.run(["git", "commit", "--quiet", "--message=A round"], cwd=workshop, check=True)
    return workshop


@pytest.fixture
def made(made_once: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(made_once, tmp_path / "workshop", symlinks=True))


def test_dvc_runs_what_a_change_touches_and_no_more(made: Path) -> None:
    assert ran(made) == []
    params = yaml.safe_load((made / "params.yaml").read_text())
    params["train"]["lr"] = 0.002
    (made / "params.yaml").write_text(yaml.safe_dump(params))
    assert ran(made) == ["train", "evaluate", "decide", "figures"]
    assert ran(made) == []


def test_dvc_shows_a_dozen_figures_three_plots_and_readable_experiments(made: Path) -> None:
    """Another threshold of the decision is another experiment, of which two stages run again."""
    figures = json.loads(dvc(made, "metrics", "show", "--json"))[""]["data"]
    ((name, shown),) = figures.items()
    assert name == "runs/dvc/figures/metrics.json"
    assert 8 <= len(shown["data"]) <= 12
    assert shown["data"] == json.loads((made / name).read_text())
    assert {"accuracy", "gain", "judges_agreement", "pairs", "verdict"} <= {*shown["data"]}

    page = (made / dvc(made, "plots", "show", "--out", "plots").strip().removeprefix("file://")).read_text()
    plots = json.loads(dvc(made, "plots", "show", "--json", "--split", "--out", "plots"))["data"]
    assert sorted(plots) == ["accuracy", "gaps", "reliability"]
    assert all(title in page for title in ("Accuracy before (0) and after (1) the round", "Score gaps of the pairs"))

    assert re.findall(r"Running stage '([^']+)'", dvc(made, "exp", "run", "--set-param", "decide.min_gain=0.4")) == [
        "decide",
        "figures",
    ]
    table = list(csv.DictReader(dvc(made, "exp", "show", "--only-changed", "--csv").splitlines()))
    assert len(table) == 3  # the workspace, the commit, and the experiment
    assert len(table[0]) <= 20
    assert {row["decide.min_gain"] for row in table} == {"0.0", "0.4"}
