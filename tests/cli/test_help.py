"""Help is grouped, describes every argument and shows the effective parameters.

In a pipe it is plain text.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clincot.cli.app import get_command, main
from clincot.cli.reference import render_cli_reference
from clincot.stages.catalog import ARTIFACTS, STAGES, describe_artifact

PANELS = {
    "Stages": [stage.name for stage in STAGES],
    "Rounds and inspection": ["rounds", "demo", "params", "recipes", "show", "power", "blind", "report-metrics"],
    "Data": ["ingest", "render", "report-questions", "data"],
    "Models and judges": ["small-models", "calibrate", "doctor", "models"],
    "Serving and deployment": ["serve", "deploy", "approve", "store"],
    "Kubeflow": ["pipeline"],
}


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder without a params.yaml."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main([*words, "--help"])
    assert exit_info.value.code == 0
    return capsys.readouterr().out


def iter_commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, command
    commands = getattr(command, "commands", {})
    for name in commands:
        yield from iter_commands(commands[name], f"{path} {name}".strip())


def test_commands_are_listed_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = read_help(capsys)
    blocks = dict(re.findall(r"^(\w[\w ]+):\n((?:    .*\n)+)", text, re.MULTILINE))
    assert [title for title in blocks if title in PANELS] == list(PANELS)
    for title, names in PANELS.items():
        listed = re.findall(r"^    ([a-z][a-z-]*)", blocks[title], re.MULTILINE)
        assert set(names) <= set(listed), title


def test_every_command_and_argument_has_a_sentence() -> None:
    undescribed = []
    for path, command in iter_commands(get_command()):
        if len((command.help or "").split()) < 3:
            undescribed.append(path)
        undescribed += [f"{path} {one.name}" for one in command.params if len((one.help or "").split()) < 3]
    assert undescribed == []


def test_every_path_of_a_stage_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in STAGES:
        text = " ".join(read_help(capsys, stage.name).split())
        for name in (*stage.inputs, *stage.optional, *stage.outputs):
            assert describe_artifact(stage.name, name) in text, (stage.name, name)


def test_only_known_paths_are_described() -> None:
    used = {name for stage in STAGES for name in stage.inputs + stage.optional + stage.outputs}
    assert used == set(ARTIFACTS)


def test_help_shows_the_values_that_would_run(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "params.yaml").write_text("train: {beta: 0.7, epochs: 3}")
    text = read_help(capsys, "train", "--set", "train.epochs=2", "--set=train.lr=1e-6")
    assert "train.beta = 0.7" in text
    assert "train.epochs = 2.0" in text
    assert "train.lr = 1.0e-06" in text
    assert "as they would run, from the defaults, then ./params.yaml, then --set:" in text


@pytest.mark.parametrize("words", [["--recipe", "r.yaml"], ["-r", "r.yaml"], ["-rr.yaml"], ["--recipe=r.yaml"]])
def test_help_shows_a_recipes_values(words: list[str], empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a recipe, ./params.yaml is only read if it is named."""
    (empty / "params.yaml").write_text("pair: {min_gap: 0.4}")
    (empty / "r.yaml").write_text("recipe: {name: mine, about: for this test}\npair: {min_gap: 0.2, per_question: 5}")
    text = read_help(capsys, "pair", *words)
    assert "pair.min_gap = 0.2" in text
    assert "from the defaults, then the recipe mine (r.yaml):" in " ".join(text.split())
    text = read_help(capsys, "pair", *words, "--params", "params.yaml")
    assert "pair.min_gap = 0.4" in text
    assert "pair.per_question = 5" in text
    assert "from the defaults, then the recipe mine (r.yaml), then ./params.yaml:" in " ".join(text.split())


def test_help_shows_values_as_yaml(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = read_help(capsys, "train")
    assert "train.projector_lr = null\n" in text
    assert "train.freeze_vision = true\n" in text
    text = read_help(capsys, "judge", "--recipe", "small-model")
    assert "judge.judges = [{name: judge-a, path: 'shipped:judge-a'}, {name: judge-b," in text
    many = ", ".join(f"{{name: judge-{number}, path: shipped:judge-a}}" for number in range(9))
    lines = read_help(capsys, "judge", "--set", f"judge.judges=[{many}]").splitlines()
    (judges,) = (line for line in lines if "judge.judges =" in line)
    assert judges.endswith(" …")
    assert len(judges) < 190


def test_help_refers_to_other_stages_sections(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "preflight.train: see `clincot train --help`\n" in read_help(capsys, "preflight")
    assert "evaluate.propose: see `clincot propose --help`\n" in read_help(capsys, "evaluate")
    text = read_help(capsys, "evaluate", "--set", "evaluate.propose.hypotheses=3")
    assert "evaluate.propose.hypotheses = 3\n" in text


def test_help_names_the_recipe_of_a_file(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "params.yaml").write_text("recipe: {name: small-model}\npair: {min_gap: 0.4}")
    text = " ".join(read_help(capsys, "pair").split())
    assert "from the defaults, then the recipe small-model, which params.yaml names, then ./params.yaml:" in text
    assert "pair.min_gap = 0.4" in text


def test_help_works_with_a_broken_params_file(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "params.yaml").write_text("pair: {min_gap: -1}")
    text = " ".join(read_help(capsys, "pair").split())
    assert "from the defaults only, because of an error: params.yaml: pair.min_gap" in text
    assert "pair.min_gap = 0." in text


def test_brackets_of_descriptions_are_kept(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "[ClinCoT code: 0.1]" in read_help(capsys, "train")
    assert "[UV-CoT: 0.7]" in read_help(capsys, "answer")


@pytest.mark.parametrize("words", [[], ["train"], ["pipeline", "submit"]], ids=" ".join)
def test_output_in_a_pipe_is_plain_and_has_one_width(words: list[str], empty: Path) -> None:
    texts = set()
    for columns, term in (("40", "dumb"), ("200", "xterm-256color")):
        environment = {**os.environ, "COLUMNS": columns, "TERM": term, "FORCE_COLOR": "1", "HOME": str(empty)}
        command = [sys.executable, "-m", "clincot", *words, "--help"]
        texts.add(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    (text,) = texts
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 105


def complete(words: str, empty: Path) -> list[str]:
    """Return what bash offers for the last word."""
    environment = {
        **os.environ,
        "_CLINCOT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    command = [sys.executable, "-c", "from clincot.cli import main; main()"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=empty).stdout.split()


def test_the_shell_completes_commands_and_options(empty: Path) -> None:
    assert complete("clincot tr", empty) == ["train"]
    assert complete("clincot models pr", empty) == ["prune"]
    assert "--predictor_host" in complete("clincot serve --pred", empty)
    assert complete("clincot render --composition w", empty) == ["without"]


def test_the_reference_has_every_command_and_argument() -> None:
    text = render_cli_reference()
    for path, command in iter_commands(get_command()):
        if path:
            assert f"# `clincot {path}`\n" in text
        for one in command.params if path else ():
            assert (one.opts[0] if one.param_type_name == "option" else one.name.upper()) in text or one.metavar in text
            assert " ".join(one.help.split()).replace("|", "\\|") in text


def test_the_reference_is_the_same_everywhere(empty: Path) -> None:
    """It does not depend on the folder, params.yaml, the home folder or the terminal."""
    (empty / "params.yaml").write_text("train: {beta: 0.7}")
    environment = {**os.environ, "HOME": "/home/somebody", "COLUMNS": "50"}
    command = [sys.executable, "-c", "from clincot.cli.reference import render_cli_reference as r; print(r(), end='')"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert text == render_cli_reference()
    assert "somebody" not in text
