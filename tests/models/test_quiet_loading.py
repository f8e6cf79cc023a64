"""Logs of a pod have no progress bars, and the shipped checkpoints load without a warning."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ASSETS = Path(__file__).parents[2] / "assets"
LOAD = """
import sys
from clincot.models.vlm import load_checkpoint
for path in sys.argv[1:]:
    load_checkpoint(path)
"""


def read_stderr_of_loading(*paths: Path) -> str:
    """Load checkpoints in a process whose standard error is a pipe, as in a pod."""
    done = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=True)
    return done.stderr


@pytest.mark.slow
def test_shipped_checkpoints_load_in_silence() -> None:
    assert read_stderr_of_loading(*(ASSETS / name for name in ("policy", "judge-a", "judge-b"))) == ""


@pytest.mark.slow
def test_a_checkpoints_own_bad_ids_are_still_reported(tmp_path: Path) -> None:
    """The shipped policy has 1024 tokens, so a first token 2000 is outside its vocabulary."""
    folder = tmp_path / "policy"
    shutil.copytree(ASSETS / "policy", folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["bos_token_id"] = 2000
    (folder / "config.json").write_text(json.dumps(config))
    said = read_stderr_of_loading(folder)
    assert "bos_token_id must be `None` or an integer within the vocabulary (between 0 and 1023), got 2000" in said
