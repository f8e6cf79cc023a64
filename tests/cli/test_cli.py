"""Help for every command, exit codes, and messages that name what is wrong."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clincot import __version__
from clincot.cli import app, stage_commands
from clincot.cli.app import GUIDE, main, parse
from clincot.config import SECTION_NAMES, FrozenConfig, Params, load_params, resolve_path
from clincot.config.params_yaml import render_value
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
from clincot.waiting import WAIT_ENV, get_waiting
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
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a data set and without a params.yaml."""
    monkeypatch.chdir(tmp_path)
    tiny.write_set(tmp_path / "data", key=False)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    return tmp_path


def prepare(*more: str) -> list[str]:
    return ["prepare", "--data", "data", "--questions", "q.jsonl", *more]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    assert f"usage: clincot {command}" in capsys.readouterr().out


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert [command for command in COMMANDS if f"\n    {command}" not in text] == []


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stages_help_shows_its_paths_and_parameters(
    stage: Stage, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every parameter is shown with its default."""
    with pytest.raises(SystemExit):
        main([stage.name, "--help"])
    text = capsys.readouterr().out
    for name in (*stage.inputs, *stage.optional, *stage.outputs):
        assert f"--{name.replace('_', '-')}" in text
    expected = list(iter_shown_parameters(stage.name, getattr(Params(), stage.name)))
    assert [line for line in expected if line not in text] == []


def iter_shown_parameters(path: str, config: FrozenConfig) -> Iterator[str]:
    """The line of every parameter below `path`; another command's section is only referred to."""
    for name, value in config:
        if not isinstance(value, FrozenConfig):
            yield f"{path}.{name} = {render_value(config, name)}\n"
        elif name in SECTION_NAMES:
            yield f"{path}.{name}: see `clincot {name} --help`"
        else:
            yield from iter_shown_parameters(f"{path}.{name}", value)


def test_a_stage_runs_and_prints_its_metrics(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(prepare("--set", "prepare.rounds=1", "--set", "prepare.limit=5")) == 0
    assert json.loads(capsys.readouterr().out) == {"questions": 5}
    assert len((workdir / "q.jsonl").read_text().splitlines()) == 5


def test_params_yaml_of_the_working_folder_is_the_default(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The option --params names another file."""
    (workdir / "params.yaml").write_text("prepare: {rounds: 1, limit: 2}")
    (workdir / "other.yaml").write_text("prepare: {rounds: 1, limit: 3}")
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
def test_a_wrong_parameter_is_named_and_nothing_runs(
    override: str, named: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(prepare("--set", override)) == 1
    error = capsys.readouterr().err
    assert error.startswith("clincot prepare: ")
    assert named in error
    assert not (workdir / "q.jsonl").exists()


def test_a_number_without_a_point_is_accepted(workdir: Path) -> None:
    """Every stage checks every section. YAML alone would read 1e-5 as text."""
    assert main(prepare("--set", "train.lr=1e-5", "--set", "prepare.rounds=1")) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--data", "nowhere", "--questions", "q.jsonl"], "nowhere does not exist"),
        (["prepare", "--data", "data", "--questions", "q.jsonl", "--params", "no.yaml"], "no.yaml: no such file"),
        (["ingest", "jsonl", "no.jsonl", "--out", "out"], "no.jsonl"),
        (["ingest", "slake", "nowhere", "--out", "out"], "nowhere: expected it to contain the folder 'imgs'"),
        (["ingest", "iu-xray", "nowhere", "--out", "out"], "nowhere/annotation.json: file not found"),
        (["ingest", "dicom", "nowhere", "--out", "out", "--salt-file", "salt"], "nowhere: expected a folder of DICOM"),
        (["ingest", "vqa-rad", "nowhere", "--out", "out"], "to contain the file 'VQA_RAD_Dataset_Public.json'"),
        (["ingest", "slake", "data", "--out", "out", "--test-share", "2"], "test_share is a share of the images in"),
        (["ingest", "slake", "data", "--out", "out", "--allow-refused", "-1"], "at least 0 rows may be refused"),
        (["report-questions", "data", "--out", "out", "--workers", "0"], "at least 1 worker, got 0"),
        (["blind", "--train", "data"], "expected either --data or both --train and --test"),
        (["show", "pair-0", "--run", "no-run"], "no-run"),
        (["show", "pair-0", "--picture", "p.txt"], "--picture p.txt: .txt is no image format; expected .png or .jpg"),
        (["params", "--params", "binary.yaml"], "binary.yaml: not UTF-8 text (invalid start byte at byte 0)"),
        (["params", "--recipe", "binary.yaml"], "binary.yaml: not UTF-8 text (invalid start byte at byte 0)"),
        (["params", "--params", "data"], "data is a directory; expected a YAML file"),
        (["params", "--set", "judge.judges=[{name: a}]"], "judge.judges.0: judge 'a' needs either path or url"),
        (["ingest", "jsonl", "data/questions.jsonl", "--out", "data"], "--out data contains the source data/questions"),
        (["prepare", "--data", "data", "--questions", "data/questions.jsonl"], "is inside input 'data' (data)"),
        (["page", "--run", "no-run"], "no-run"),
        (["blind", "--train", "data", "--test", "data"], "references.jsonl"),
        (["report-questions", "data", "--out", "out"], "data/reports.jsonl: file not found"),
        (["report-metrics", "--references", "no.jsonl", "--hypotheses", "no.jsonl"], "no.jsonl: file not found"),
        (["rounds", "--run", "r", "--data", "data", "--benchmark", "data", "--policy", "p", "--count", "0"], "--count"),
        (
            ["rounds", "--run", "r", "--data", "data", "--benchmark", "data", "--policy", "p"],
            "policy: p does not exist",
        ),
    ],
)
def test_user_errors_are_one_line(
    arguments: list[str], message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"clincot {arguments[0]}: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("fault", [RuntimeError("shapes differ"), KeyError("answer"), ValueError("bad axis")])
def test_program_errors_keep_their_traceback(
    fault: Exception, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They used to be reported as user errors.

    The message was one line, such as "clincot prepare: 'answer'".
    """

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
def test_user_errors_of_a_stage_are_one_line(
    error: Exception, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(*stage: object) -> None:
        raise error

    monkeypatch.setattr(stage_commands, "run_stage", refusing)
    assert main(prepare()) == 1
    assert capsys.readouterr().err == f"clincot prepare: {error}\n"
    assert "no study" not in str(error) or str(error)[0] != "'"  # a KeyError quotes its message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["trian"], "'trian'"),
        (["prepare", "--data", "data"], "--questions"),
        (["render", "--out", "o", "--images", "3", "--warps", "5:2"], "FROM < TO"),
        (["render", "--out", "o", "--images", "3", "--warps", "5"], "FROM:TO"),
        (["render", "--out", "o", "--images", "many", "--warps", "0:2"], "--images"),
        (["rounds", "--run", "r"], "--data"),
        (["serve", "--checkpoint", "c", "--port", "80000"], "--port"),
        (["store", "watch", "s", "--port", "-1"], "--port"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vqa-rad", "slake", "iu-xray", "dicom", "jsonl"])
def test_every_format_of_ingest_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["ingest", name, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("SOURCE", "--split", "--allow-refused", "--workers"))


def test_ingest_exits_with_1_for_refused_rows(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps the others, and --allow-refused sets how many rows may be refused."""
    image = next((workdir / "data" / "images").iterdir()).relative_to(workdir)
    rows = [
        {"image": str(image), "question": "?", "answer": "yes"},
        {"image": "gone.png", "question": "?", "answer": "no"},
    ]
    (workdir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["ingest", "jsonl", "rows.jsonl", "--out", "out"]) == 1
    output = capsys.readouterr()
    assert "2 rows read, 1 kept, 0 duplicates dropped, 1 refused" in output.out
    assert "rows.jsonl:2: image: gone.png" in output.out
    assert output.err.startswith("clincot ingest: 1 row was refused, 0 allowed; the 1 others were kept. Fix")
    assert len((workdir / "out" / "questions.jsonl").read_text().splitlines()) == 1
    assert main(["ingest", "jsonl", "rows.jsonl", "--out", "out", "--allow-refused", "1"]) == 0


def test_a_reader_that_ends_early_is_no_error(workdir: Path) -> None:
    """As in `clincot params | head -1`, for an output that is longer than what a pipe holds."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "clincot", "params"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_guides_round_needs_nothing_of_the_repository(workdir: Path) -> None:
    """Every line of `clincot --help` about a round parses, with a policy that the package ships."""
    lines = GUIDE.replace("\\\n", " ").splitlines()
    (words,) = (shlex.split(line)[1:] for line in lines if line.startswith("  clincot rounds "))
    parse(words)
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert resolve_path(options["--policy"]).is_dir()
    assert load_params(None, [options["--set"]], options["--recipe"]).judge.judges
    for folder in (options["--data"], options["--benchmark"]):
        assert f"clincot render --out {folder} " in GUIDE


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clincot.cli.app", "--version"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, f"clincot {__version__}\n")


@pytest.mark.parametrize(
    ("command", "budget_s"),
    [("preflight", 30.0), ("pipeline", 30.0), ("models", 30.0), ("train", 600.0), ("rounds", 600.0)],
)
def test_a_command_that_somebody_waits_for_gives_up_sooner(
    command: str, budget_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default of tasks is ten minutes; $CLINCOT_WAIT_S overrides both."""
    monkeypatch.delenv(WAIT_ENV)
    monkeypatch.setattr("clincot.waiting._current", [])
    with app._limit_waiting(command):
        assert get_waiting().budget_s == budget_s
    monkeypatch.setattr("clincot.waiting._current", [])
    monkeypatch.setenv(WAIT_ENV, "7")
    with app._limit_waiting(command):
        assert get_waiting().budget_s == 7.0
