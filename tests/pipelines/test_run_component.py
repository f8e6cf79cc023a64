"""A pod runs the component of its image, with the arguments that Kubeflow's launcher fills in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from clincot.jsonl import write_json
from clincot.pipelines.round import compile_round
from clincot.pipelines.round_plan import RoundPlan


def test_the_command_of_a_task_runs_its_component(tmp_path: Path) -> None:
    """As the launcher of 2.17.0 does (backend/src/v2/component/launcher_v2.go): `{{$}}` is the ExecutorInput."""
    compile_round(RoundPlan(rounds=2), tmp_path / "round.yaml")
    spec, _ = yaml.safe_load_all((tmp_path / "round.yaml").read_text(encoding="utf-8"))
    container = spec["deploymentSpec"]["executors"]["exec-select-champion"]["container"]
    for side in ("champion", "challenger"):
        (tmp_path / side).mkdir()
        write_json(tmp_path / side / "report.json", {"policy": side})

    def artifact(name: str, path: Path) -> dict[str, object]:
        return {"artifacts": [{"name": name, "type": {"schemaTitle": "system.Dataset"}, "uri": str(path)}]}

    executor_input = {
        "inputs": {
            "parameterValues": {"verdict": "promote"},
            "artifacts": {
                "champion_results": artifact("champion_results", tmp_path / "champion"),
                "challenger_results": artifact("challenger_results", tmp_path / "challenger"),
            },
        },
        "outputs": {
            "artifacts": {"next_champion_results": artifact("next_champion_results", tmp_path / "next")},
            "outputFile": str(tmp_path / "output.json"),
        },
    }
    filled = [json.dumps(executor_input) if word == "{{$}}" else word for word in container["args"]]
    command = [sys.executable if word == "python3" else word for word in container["command"]]
    done = subprocess.run([*command, *filled], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "next" / "report.json").read_text()) == {"policy": "challenger"}
    assert "next_champion_results" in (tmp_path / "output.json").read_text()
