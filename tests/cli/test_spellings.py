"""Command lines that people, charts and KServe write keep their meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clincot.cli import stage_commands
from clincot.cli.app import get_command, main, parse
from clincot.cli.serve_command import ServeArguments
from tests.cli.spellings import SPELLINGS


def find_command(path: str) -> Any:
    command = get_command()
    for name in path.split():
        command = command.commands[name]
    return command


def spell(command: Any) -> set[str]:
    """Return the arguments of a command in the notation of SPELLINGS."""
    spellings = set()
    for parameter in command.params:
        mark = "!" if parameter.required else ""
        if parameter.param_type_name == "argument":
            spellings.add(f"<{parameter.name}>" if parameter.required else f"[{parameter.name}]")
            continue
        value = "" if parameter.is_flag else "="
        spellings |= {f"{name}{value}{mark}" for name in parameter.opts}
    return spellings


@pytest.mark.parametrize("path", SPELLINGS)
def test_no_argument_has_disappeared(path: str) -> None:
    """New arguments are optional."""
    old, new = set(SPELLINGS[path].split()), spell(find_command(path))
    assert old - new == set()
    assert {name for name in new - old if name.endswith(("!", ">"))} == set()


def test_positional_arguments_keep_their_order() -> None:
    order = {"data diff": ["a", "b"], "pipeline put": ["folder", "url"]}
    for path, names in order.items():
        arguments = [one.name for one in find_command(path).params if one.param_type_name == "argument"]
        assert arguments == names


def read_serve_arguments(monkeypatch: pytest.MonkeyPatch, *words: str) -> ServeArguments:
    """Return the arguments with which `clincot serve` is called."""
    calls: list[ServeArguments] = []

    def record(args: ServeArguments) -> int:
        calls.append(args)
        return 0

    commands: dict[str, Any] = {}
    from clincot.cli.framework import add_command

    add_command(commands, "serve", record, ServeArguments)
    monkeypatch.setitem(get_command().commands, "serve", commands["serve"].build())
    assert main(["serve", *words]) == 0
    return calls[0]


def test_kserves_flags_with_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--checkpoint=/mnt/models", "--predictor_host=model.ns", "--http_port", "81", "--model_name", "chest")
    args = read_serve_arguments(monkeypatch, *words)
    assert (args.predictor_host, args.port, args.model_name) == ("model.ns", 81, "chest")


def test_dashes_and_repeated_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--set", "running=16", "--checkpoint", "c", "--set=waiting=2", "--predictor-host", "h", "--port", "1")
    args = read_serve_arguments(monkeypatch, *words, "--port", "82", "--api-keys", "keys")
    assert args.overrides == ["running=16", "waiting=2"]
    assert (args.predictor_host, args.port, args.api_keys) == ("h", 82, Path("keys"))
    assert args.abstain_below is None


def test_options_may_precede_positional_arguments() -> None:
    for words in (["show", "--run", "r", "pair-1"], ["show", "pair-1", "--run=r"], ["show", "--", "pair-1"]):
        assert parse(words).command == "show"


@pytest.mark.parametrize(
    "words",
    [
        ["rounds", "--run", "r", "--data", "d", "--benchmark", "b", "--policy", "p", "--from", "nowhere"],
        ["rounds", "--run", "r", "--data", "d", "--benchmark", "b", "--policy", "p", "--compare", "ppo"],
        ["sft", "policy", "--data", "d", "--policy", "p", "--out", "o", "--part", "5"],
        ["sft", "nurse", "--data", "d", "--policy", "p", "--out", "o"],
        ["models", "list", "--keep", "1"],
        ["models", "list", "more"],
        ["store"],
        ["ingest", "slake", "there"],
    ],
    ids=" ".join,
)
def test_wrong_values_exit_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(words)
    assert exit_info.value.code == 2


def test_parsing_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    invocation = parse(["prepare", "--data", "nowhere", "--questions", "q.jsonl"])
    assert invocation.command == "prepare"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage_commands, "run_stage", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(["prepare", "--data", "d", "--questions", "q.jsonl"])
