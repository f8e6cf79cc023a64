"""Puts the stand-in for vLLM in vLLM's place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

STAND_IN = Path(__file__).with_name("vllm_stand_in.py")


def install_stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CLINCOT_VLLM name a command in the folder that runs the stand-in."""
    command = folder / "vllm"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("CLINCOT_VLLM", str(command))
