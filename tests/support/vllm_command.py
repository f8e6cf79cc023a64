"""Puts the stand-in for vLLM in vLLM's place."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

STAND_IN = Path(__file__).with_name("vllm_stand_in.py")


def install_stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CLINCOT_VLLM name a command in the folder that runs the stand-in."""
    command = folder / "vllm"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("CLINCOT_VLLM", str(command))


def read_pids(path: Path) -> list[int]:
    """The process ids that the stand-in wrote (STAND_IN_PIDS)."""
    return [int(word) for word in path.read_text().split()]


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
