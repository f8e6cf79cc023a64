"""scripts/e2e-kind.sh, run with stand-ins of docker, kind, kubectl, helm and curl that record how they are called.

It cannot be run against a cluster here, so each recorded command is checked by the program that would get it: flags by
the real helm and kubectl, values by the chart, commands in the images by `clincot`, and Python code by its compiler.
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from kfp import Client

from clincot.cli.app import parse
from clincot.config import load_params
from tests.chart.rendering import CHART, ROOT, of_kind, rendered, run, settings_of, template

STANDIN = r"""#!/usr/bin/env bash
# Records its arguments, and answers what the script reads.
tool=${0##*/}
printf '%s\0' "$tool" "$@" $'\x1e' >> "$CALLS"
case "$tool $*" in
  *'{{.NCPU}}') echo 8 ;;
  *'{{.MemTotal}}') echo 16000000000 ;;
  *'pipeline put /work/data'*) echo s3://clincot/e2e/1111 ;;
  *'pipeline put /work/benchmark'*) echo s3://clincot/e2e/2222 ;;
  *'models list'*) if grep -q e2e-promote "$CALLS"; then echo challenger; else echo base; fi ;;
  *'rev-parse HEAD') echo 0123456 ;;
  *'get secret'*) printf secret | base64 ;;
  *'get configmap'*) echo '{}' ;;
  *'-o name') printf 'job.batch/clincot-rollout-1\njob.batch/clincot-rollout-2\n' ;;
  *'get job '*) echo "${JOB_STATE:-Complete}" ;;
  *'get events'*) echo "clincot ${EVENT:-Started container}" ;;
esac
"""
TOOLS = ("docker", "kind", "kubectl", "helm", "git", "curl")
Call = list[str]


def play(folder: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], list[Call]]:
    """Run the script with the stand-ins first in PATH; return it and what they were called with."""
    places = folder / "bin"
    places.mkdir()
    for name in TOOLS:
        (places / name).write_text(STANDIN)
        (places / name).chmod(0o755)
    calls = folder / "calls"
    known = {**os.environ, "PATH": f"{places}:{os.environ['PATH']}", "CALLS": str(calls), "LOGS": str(folder / "logs")}
    script = ROOT / "scripts" / "e2e-kind.sh"
    done = subprocess.run([script], env={**known, **env}, capture_output=True, text=True, timeout=120, check=False)
    return done, [one.split("\0")[:-1] for one in calls.read_text().split("\x1e\0") if one]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    done, calls = play(tmp_path_factory.mktemp("e2e"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks passed" in done.stdout
    return calls


def of_tool(calls: list[Call], tool: str) -> list[Call]:
    return [call[1:] for call in calls if call[0] == tool]


def in_image(calls: list[Call]) -> list[Call]:
    """Return the commands of `clincot` that run in the cpu image."""
    found = []
    for call in of_tool(calls, "docker"):
        images = [
            number for number, word in enumerate(call) if word.startswith("clincot-cpu:") and "--entrypoint" not in call
        ]
        if call[0] == "run" and images:
            found.append(call[images[0] + 1 :])
    return found


@pytest.mark.parametrize("tool", ["helm", "kubectl"])
def test_every_flag_exists(calls: list[Call], tool: str) -> None:
    """With --help, the real programs refuse unknown commands and flags, and do nothing else."""
    commands = {shlex.join(call) for call in of_tool(calls, tool)}
    assert len(commands) >= 5
    for command in commands:
        for version in ("3", "4"):
            words = ["-" if word == "-" else word for word in shlex.split(command)]
            cut = words.index("--") if "--" in words else len(words)
            done = run(tool, version, *words[:cut], "--help")
            assert done.returncode == 0, (command, done.stderr)
            assert "Usage:" in done.stdout, command


def test_the_chart_takes_every_value(calls: list[Call]) -> None:
    upgrades = [call for call in of_tool(calls, "helm") if "charts/clincot" in call]
    assert len(upgrades) >= 4
    scheduled = 0
    for call in upgrades:
        flags = call[call.index("charts/clincot") + 1 :]
        names = ("--set", "--set-string")
        values = [word for name, value in itertools.pairwise(flags) if name in names for word in (name, value)]
        done = template("--values", str(CHART / "values-cpu.yaml"), *values)
        assert done.returncode == 0, done.stderr
        scheduled += "--cron=0 */5 * * * *" in done.stdout
    assert scheduled == 1


def test_clincot_takes_every_command_in_the_image(calls: list[Call]) -> None:
    commands = in_image(calls)
    for command in commands:
        parse(command)
    names = {" ".join(command[:2]) for command in commands}
    assert names >= {"pipeline put", "pipeline submit", "pipeline status", "models list"}


def test_one_round_keeps_and_one_promotes(calls: list[Call], tmp_path: Path) -> None:
    """Their settings are valid in the release's params.yaml, and set what decides."""
    (tmp_path / "params.yaml").write_text(settings_of(rendered("cpu"))["params.yaml"])
    rounds = [command for command in in_image(calls) if command[:2] == ["pipeline", "submit"]]
    decided = {}
    for command in rounds:
        options = [value for name, value in itertools.pairwise(command) if name == "--set"]
        params = load_params(tmp_path / "params.yaml", options)
        decided[command[command.index("--run-name") + 1]] = params.decide
    assert set(decided) == {"e2e-keep", "e2e-promote"}
    assert decided["e2e-keep"].min_gain == 1  # accuracies are in 0 … 1, so no gain is above 1
    promoting = decided["e2e-promote"]
    assert promoting.min_gain == -1  # and none is below -1
    assert promoting.floors.enabled == {}
    assert promoting.arm in load_params(tmp_path / "params.yaml").evaluate.arms
    assert promoting.length_auc_tolerance == 0.5


def test_the_python_code_fits_the_client(calls: list[Call]) -> None:
    codes = [call[call.index("-c") + 1] for call in of_tool(calls, "docker") if "--entrypoint" in call]
    assert len(codes) == 2
    for code in codes:
        compile(code, "e2e", "exec")
        called = set(re.findall(r"client\.(\w+)\(", code))
        assert called
        assert all(hasattr(Client, name) for name in called), called
    form = next(code for code in codes if "run_pipeline" in code)
    (started,) = [
        one for one in ast.walk(ast.parse(form)) if isinstance(one, ast.Call) and "run_pipeline" in ast.dump(one.func)
    ]
    given = {keyword.arg for keyword in started.keywords}
    assert not given & {"service_account", "params"}  # as with empty fields


def test_both_namespaces_are_restricted_before_their_pods(calls: list[Call]) -> None:
    """The namespace of runs is restricted when Kubeflow's own pods are there, which do not all comply."""
    order = [shlex.join(call) for call in calls if call[0] in ("kubectl", "helm")]
    label = "pod-security.kubernetes.io/enforce=restricted"
    at = {name: order.index(f"kubectl label --overwrite namespace {name} {label}") for name in ("clincot", "kubeflow")}
    installed = next(number for number, one in enumerate(order) if "charts/clincot" in one)
    available = next(number for number, one in enumerate(order) if "condition=Available" in one and "kubeflow" in one)
    assert at["clincot"] < installed
    assert available < at["kubeflow"] < installed


def test_files_and_names_are_those_of_the_chart(calls: list[Call]) -> None:
    objects = rendered("cpu")
    (config,) = of_kind(objects, "ConfigMap", "clincot", "clincot")
    read = {
        match[1]
        for call in of_tool(calls, "kubectl")
        for match in [re.search(r"\.data\.(\w+\\\.yaml)", call[-1])]
        if match
    }
    assert {name.replace("\\", "") for name in read} == set(config["data"])
    names = {(one["kind"].lower(), one["metadata"]["name"]) for one in objects}
    assert {("statefulset", "clincot-seaweedfs"), ("service", "clincot-seaweedfs")} <= names
    jobs = {one["metadata"]["labels"]["app.kubernetes.io/component"] for one in of_kind(objects, "Job")}
    assert "deployer" in jobs  # by which the script finds the rollout


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JOB_STATE": "Failed"}, "job clincot-rollout-2 failed"),
        ({"EVENT": 'pods "x" is forbidden: violates PodSecurity "restricted:latest"'}, "Pod Security refused a pod"),
    ],
)
def test_a_failure_ends_the_script(env: dict[str, str], message: str, tmp_path: Path) -> None:
    done, calls = play(tmp_path, **env)
    assert done.returncode == 1
    assert message in done.stderr
    assert ["kind", "delete", "cluster", "--name", "clincot-e2e"] in calls


def test_its_versions_are_tested_together() -> None:
    """The script's Kubernetes is one of those against whose schemas the chart is validated."""
    text = (ROOT / "scripts" / "e2e-kind.sh").read_text()
    node = re.search(r"kindest/node:v(\d+\.\d+)", text)
    assert node is not None
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"] == ">=1.30.0-0"
    assert node[1] in ("1.30", "1.33", "1.37")
