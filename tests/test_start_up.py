"""What a command and a stage import before they work: nothing heavy that they do not need.

Each test starts a Python of its own, because this one has imported everything already.
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import textwrap
from importlib.resources import files

import pytest

from clincot.cli.all_commands import TABLE, list_commands, read_command_table, render_command_table
from clincot.cli.app import LONG_COMMANDS
from clincot.stages.catalog import STAGES, get_stage

LEARNING = {"torch", "transformers", "sklearn", "pandas"}  # 5 s of imports
# Stages that compute without a model. `publish` loads one only when it answers golden questions.
STAGES_WITHOUT_A_MODEL = ("preflight", "prepare", "pair", "version", "decide", "publish")


def import_in_child(code: str) -> set[str]:
    """The top-level packages that a new Python has imported after some code."""
    ending = "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_no_command() -> None:
    """The list of commands comes from a table: neither pydantic (the settings) nor numpy is imported."""
    code = """
    from clincot.cli import main
    try:
        main(["--help"])
    except SystemExit as ended:
        assert ended.code == 0
    """
    imported = import_in_child(textwrap.dedent(code))
    assert "typer" in imported
    assert not imported & {*LEARNING, "numpy", "pydantic", "kfp", "httpx"}


def test_table_of_commands_is_up_to_date() -> None:
    """If this fails, run `make docs-reference`."""
    assert files("clincot.cli").joinpath(TABLE).read_text(encoding="utf-8") == render_command_table()
    assert read_command_table() == list_commands()


def test_every_stage_but_preflight_waits_like_a_task() -> None:
    assert {stage.name for stage in STAGES} - {"preflight"} <= LONG_COMMANDS
    assert {row.name for row in list_commands()} >= LONG_COMMANDS


def list_imports(stage: str) -> list[str]:
    """The modules that a stage imports when it is run: the imports inside its function."""
    source = textwrap.dedent(inspect.getsource(get_stage(stage).run))
    found = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    assert found, stage
    return found


@pytest.mark.parametrize("stage", STAGES_WITHOUT_A_MODEL)
def test_stage_without_a_model_imports_no_library_of_models(stage: str) -> None:
    imported = import_in_child("\n".join(f"import {module}" for module in list_imports(stage)))
    assert "clincot" in imported
    assert not imported & LEARNING


def test_a_panel_of_endpoints_imports_no_library_of_models() -> None:
    """A task that only asks servers starts in a second; torch and transformers take five."""
    code = "\n".join(f"import {module}" for module in list_imports("judge"))
    code += """
from clincot.config import EngineConfig, JudgeSpec
from clincot.models.rollout_engines import measure_cache_use, open_judges
judges = open_judges([JudgeSpec(name="a", url="http://127.0.0.1:9/v1", model="m")], EngineConfig(), dtype="auto")
assert len(judges) == 1
assert measure_cache_use(judges) == {}
"""
    assert not import_in_child(code) & LEARNING
