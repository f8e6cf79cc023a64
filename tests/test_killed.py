"""A run that is killed many times ends in the same bytes as an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.killing import MOMENTS

pytestmark = pytest.mark.slow

OUTPUTS = (
    "results.json",
    "base/outcomes.jsonl",
    "round-01/regions.jsonl",
    "round-01/candidates.jsonl",
    "round-01/judgements.jsonl",
    "round-01/scores.jsonl",
    "round-01/pairs.jsonl",
    "round-01/policy/model.safetensors",
    "round-01/outcomes.jsonl",
    "round-01/decision.json",
)


def test_a_run_killed_at_many_moments_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """By SIGKILL, which allows no cleanup, within stages and between them."""
    command = [sys.executable, "-m", "tests.support.killing", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [list(moment) for moment in MOMENTS]
    disturbed, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    assert [name for name in OUTPUTS if (disturbed / name).read_bytes() != (undisturbed / name).read_bytes()] == []
