"""Work in a second process: in order, with its errors, and never longer than the process that asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clincot.processes import background_worker


def note(path: Path, word: str) -> None:
    time.sleep(0.1 if word == "first" else 0.0)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{word} ")
    print(f"noted {word}")


def fail(word: str) -> None:
    raise ValueError(f"no {word}")


def stay(path: Path) -> None:
    path.write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(120)


def test_calls_are_worked_through_in_order_and_all_are_done_at_the_end(tmp_path: Path) -> None:
    with background_worker(tmp_path / "run" / "log") as beside:
        for word in ("first", "second", "third"):
            beside.submit(note, tmp_path / "words", word)
    assert (tmp_path / "words").read_text() == "first second third "
    assert (tmp_path / "run" / "log").read_text().split("\n")[:3] == ["noted first", "noted second", "noted third"]


def test_a_call_that_fails_fails_the_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no luck"), background_worker(tmp_path / "log") as beside:
        beside.submit(fail, "luck")


PARENT = """
import sys
from pathlib import Path
from clincot.processes import background_worker
from tests.test_processes import stay

if __name__ == "__main__":
    with background_worker(Path(sys.argv[1]) / "log") as beside:
        beside.submit(stay, Path(sys.argv[1]) / "pid")
"""


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Otherwise a run that is killed and started again would meet its own second process at the same files."""
    (tmp_path / "parent.py").write_text(PARENT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(tmp_path)], env=environment)
    pid = tmp_path / "pid"
    for _ in range(600):
        if pid.is_file() and pid.read_text():
            break
        time.sleep(0.1)
    child = int(pid.read_text())
    os.kill(child, 0)  # alive
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(300):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {child} lives on")
