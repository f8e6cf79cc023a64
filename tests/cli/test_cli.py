"""The command line: help for everything, exit codes, and messages that name what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clincot import __version__
from clincot.cli import stage_commands
from clincot.cli.app import main
from clincot.config import Params
from clincot.datasets.folder import UnknownStudy
from clincot.errors import ModelFailed
from clincot.images import InvalidImage
from clincot.jsonl import InvalidRecord
from clincot.judging.combination import QuorumLost
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.stages.base import Stage
from clincot.stages.catalog import STAGES
from clincot.synthetic.anatomy import AnatomyUnavailable
from clincot.synthetic.rendering import UnrenderableFindings
from clincot.training.checkpoint_writer import NonFiniteError
from tests.support import tiny

COMMANDS = [
    *(stage.name for stage in STAGES),
    "rounds",
    "ingest",
    "render",
    "small-models",
    "sft",
    "calibrate",
    "show",
    "page",
    "blind",
    "power",
    "report-questions",
    "report-metrics",
    "serve",
    "models",
    "deploy",
    "approve",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without a params.yaml, with a data set."""
    monkeypatch.chdir(tmp_path)
    tiny.write_set(tmp_path / "data", key=False)
    return tmp_path


def prepare(*more: str) -> list[str]:
    return ["prepare", "--data", "data", "--questions", "q.jsonl", *more]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: clincot {command}" in capsys.readouterr().out


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert [command for command in COMMANDS if f"\n    {command}" not in text] == []


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stages_help_shows_its_paths_and_every_parameter_with_its_default(
    stage: Stage, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([stage.name, "--help"])
    text = capsys.readouterr().out
    for name in (*stage.inputs, *stage.optional, *stage.outputs):
        assert f"--{name.replace('_', '-')}" in text
    for name, value in getattr(Params(), stage.name):
        assert f"{stage.name}.{name} = {value!r}" in text


def test_a_stage_runs_and_prints_its_metrics(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(prepare("--set", "prepare.rounds=1", "--set", "prepare.limit=5")) == 0
    assert json.loads(capsys.readouterr().out) == {"questions": 5}
    assert len((here / "q.jsonl").read_text().splitlines()) == 5


def test_params_yaml_of_the_working_folder_is_read_unless_another_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "params.yaml").write_text("prepare: {rounds: 1, limit: 2}")
    (here / "other.yaml").write_text("prepare: {rounds: 1, limit: 3}")
    counts = []
    for more in ([], ["--params", "other.yaml"], ["--set", "prepare.limit=4"]):
        assert main(prepare(*more)) == 0
        counts.append(json.loads(capsys.readouterr().out)["questions"])
    assert counts == [2, 3, 4]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("prepare.round_s=1", "prepare.round_s"),
        ("prepair.rounds=1", "prepair"),
        ("prepare.rounds=0", "prepare.rounds"),
        ("prepare.rounds=many", "prepare.rounds"),
        ("prepare.rounds", "expected section.field=value"),
        ("train.lr=[", "--set 'train.lr=['"),
    ],
)
def test_a_wrong_parameter_is_named_and_nothing_is_run(
    override: str, named: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(prepare("--set", override)) == 1
    error = capsys.readouterr().err
    assert error.startswith("clincot prepare: ")
    assert named in error
    assert not (here / "q.jsonl").exists()


def test_a_learning_rate_without_a_point_is_taken(here: Path) -> None:
    """Every section is checked whatever the stage; YAML alone would have read 1e-5 as text."""
    assert main(prepare("--set", "train.lr=1e-5", "--set", "prepare.rounds=1")) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prepare", "--data", "nowhere", "--questions", "q.jsonl"], "nowhere does not exist"),
        (["prepare", "--data", "data", "--questions", "q.jsonl", "--params", "no.yaml"], "no.yaml: no such file"),
        (["ingest", "jsonl", "no.jsonl", "--out", "out"], "no.jsonl"),
        (["ingest", "slake", "nowhere", "--out", "out"], "nowhere: expected the folder 'imgs' in it"),
        (["ingest", "iu-xray", "nowhere", "--out", "out"], "nowhere/annotation.json: there is no such file"),
        (["ingest", "dicom", "nowhere", "--out", "out", "--salt-file", "salt"], "nowhere: expected a folder of DICOM"),
        (["ingest", "vqa-rad", "nowhere", "--out", "out"], "nowhere: expected the file 'VQA_RAD_Dataset_Public.json'"),
        (["ingest", "slake", "data", "--out", "out", "--test-share", "2"], "test_share is a share of the images in"),
        (["ingest", "slake", "data", "--out", "out", "--allow-refused", "-1"], "at least 0 rows may be refused"),
        (["report-questions", "data", "--out", "out", "--workers", "0"], "at least 1 worker, got 0"),
        (["blind", "--train", "data"], "expected either --data or both --train and --test"),
        (["show", "pair-0", "--run", "no-run"], "no-run"),
        (["page", "--run", "no-run"], "no-run"),
        (["blind", "--train", "data", "--test", "data"], "references.jsonl"),
        (["report-questions", "data", "--out", "out"], "data/reports.jsonl: no such file"),
        (["report-metrics", "--references", "no.jsonl", "--hypotheses", "no.jsonl"], "no.jsonl: no such file"),
        (["rounds", "--run", "r", "--data", "data", "--benchmark", "data", "--policy", "p", "--count", "0"], "--count"),
        (
            ["rounds", "--run", "r", "--data", "data", "--benchmark", "data", "--policy", "p"],
            "policy: p does not exist",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"clincot {arguments[0]}: ")
    assert says in error
    assert "Traceback" not in error


@pytest.mark.parametrize("fault", [RuntimeError("shapes differ"), KeyError("answer"), ValueError("bad axis")])
def test_a_fault_of_the_program_keeps_its_traceback(
    fault: Exception, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were told in one line, as what a user could mend: "clincot prepare: 'answer'"."""

    def broken(*stage: object) -> None:
        raise fault

    monkeypatch.setattr(stage_commands, "run_stage", broken)
    with pytest.raises(type(fault)) as raised:
        main(prepare())
    assert raised.value is fault
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        InvalidRecord("a.jsonl:3: not a Question"),
        ModelFailed("HTTP 500"),
        QuorumLost("1 of 2 judges left"),
        UnsupportedCheckpoint("no chat template"),
        InvalidImage("a.png: damaged"),
        NonFiniteError("pair-1: NaN"),
        AnatomyUnavailable("no network"),
        UnrenderableFindings("no room"),
        UnknownStudy("no study 's' in studies.jsonl"),
        OSError(28, "No space left on device", "out.jsonl"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_user_can_mend_is_told_in_one_line(
    error: Exception, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(*stage: object) -> None:
        raise error

    monkeypatch.setattr(stage_commands, "run_stage", refusing)
    assert main(prepare()) == 1
    assert capsys.readouterr().err == f"clincot prepare: {error}\n"
    assert "no study" not in str(error) or str(error)[0] != "'"  # a KeyError quotes its message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["trian"], "'trian'"),
        (["prepare", "--data", "data"], "--questions"),
        (["render", "--out", "o", "--images", "3", "--warps", "5:2"], "FROM < TO"),
        (["render", "--out", "o", "--images", "3", "--warps", "5"], "FROM:TO"),
        (["render", "--out", "o", "--images", "many", "--warps", "0:2"], "--images"),
        (["rounds", "--run", "r"], "--data"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vqa-rad", "slake", "iu-xray", "dicom", "jsonl"])
def test_every_format_of_ingest_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["ingest", name, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("SOURCE", "--split", "--allow-refused", "--workers"))


def test_ingest_keeps_the_rest_and_exits_1_unless_it_is_allowed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((here / "data" / "images").iterdir()).relative_to(here)
    rows = [
        {"image": str(image), "question": "?", "answer": "yes"},
        {"image": "gone.png", "question": "?", "answer": "no"},
    ]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["ingest", "jsonl", "rows.jsonl", "--out", "out"]) == 1
    said = capsys.readouterr()
    assert "2 rows read, 1 kept, 0 duplicates dropped, 1 refused" in said.out
    assert "rows.jsonl:2: image: gone.png" in said.out
    assert said.err.startswith("clincot ingest: 1 row was refused, 0 allowed; the 1 others were kept. Fix")
    assert len((here / "out" / "questions.jsonl").read_text().splitlines()) == 1
    assert main(["ingest", "jsonl", "rows.jsonl", "--out", "out", "--allow-refused", "1"]) == 0


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clincot.cli.app", "--version"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, f"clincot {__version__}\n")
