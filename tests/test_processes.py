"""Background worker, retries, and processes that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from clincot.processes import background_worker, count_cores, end_with_parent, retry_call, share_cores, submit_call

pytestmark = pytest.mark.slow


def write_word(path: Path, word: str) -> None:
    time.sleep(0.1 if word == "first" else 0.0)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{word} ")
    print(f"wrote {word}")


def fail(word: str) -> None:
    raise ValueError(f"no {word}")


def write_pid_and_sleep(path: Path) -> None:
    path.write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(120)


def test_calls_are_executed_in_order_before_the_block_ends(tmp_path: Path) -> None:
    with background_worker(tmp_path / "run" / "log") as worker:
        for word in ("first", "second", "third"):
            worker.submit(write_word, tmp_path / "words", word)
    assert (tmp_path / "words").read_text() == "first second third "
    assert (tmp_path / "run" / "log").read_text().split("\n")[:3] == ["wrote first", "wrote second", "wrote third"]


def test_a_failed_call_fails_the_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no luck"), background_worker(tmp_path / "log") as worker:
        worker.submit(fail, "luck")


def test_a_call_is_queued_or_executed_at_once(tmp_path: Path) -> None:
    with background_worker(tmp_path / "log") as worker:
        submit_call(worker, write_word, tmp_path / "words", "queued").result()
        assert (tmp_path / "words").read_text() == "queued "
    assert submit_call(None, len, "word").result() == 4
    with pytest.raises(ValueError, match="no luck"):
        submit_call(None, fail, "luck")


WORKER_PARENT = """
import sys
from pathlib import Path
from clincot.processes import background_worker
from tests.test_processes import write_pid_and_sleep

if __name__ == "__main__":
    with background_worker(Path(sys.argv[1]) / "log") as worker:
        worker.submit(write_pid_and_sleep, Path(sys.argv[1]) / "pid")
"""
POPEN_PARENT = """
import os, signal, subprocess, sys
from functools import partial
from clincot.processes import end_with_parent

child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(120)"
command = [sys.executable, "-c", child, sys.argv[1] + "/pid"]
subprocess.Popen(command, preexec_fn=partial(end_with_parent, signal.SIGTERM, parent=os.getpid())).wait()
"""


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (state Z in /proc)."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and "Z" not in stat.read_text().split()[2]


def wait_until(condition: Callable[[], object], what: str) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(what)


@pytest.mark.parametrize("program", [WORKER_PARENT, POPEN_PARENT], ids=["background worker", "preexec_fn"])
def test_a_child_ends_with_a_killed_parent(program: str, tmp_path: Path) -> None:
    """Otherwise a restarted run would find the process of the killed run writing the same files."""
    (tmp_path / "parent.py").write_text(program, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(tmp_path)], env=environment)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.is_file() and pid.read_text(), "the child did not start")
    child = int(pid.read_text())
    assert is_running(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not is_running(child), f"process {child} is still running")


def test_a_child_whose_parent_has_ended_already_ends_at_once() -> None:
    """`parent` is a process that is not this one's child's parent, as if that had ended before the call."""
    command = [sys.executable, "-c", "import time; time.sleep(120)"]
    other = os.getppid()
    with subprocess.Popen(command, preexec_fn=partial(end_with_parent, parent=other)) as child:
        assert child.wait(timeout=30) == -signal.SIGKILL


class Flaky:
    """A call that fails a number of times and then returns how often it was called."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = [*errors]
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


def is_os_error(error: BaseException) -> bool:
    return isinstance(error, OSError)


def test_a_call_is_retried_with_growing_waits() -> None:
    waits: list[float] = []
    reported: list[str] = []
    call = Flaky(OSError("a"), OSError("b"))
    result = retry_call(
        call,
        is_transient=is_os_error,
        wait_s=lambda failures: 10.0 * failures,
        attempts=3,
        on_retry=lambda error, wait_s: reported.append(f"{error} {wait_s:g}"),
        sleep=waits.append,
    )
    assert result == 3
    assert waits == [10.0, 20.0]
    assert reported == ["a 10", "b 20"]


def test_the_error_of_the_last_attempt_is_raised() -> None:
    waits: list[float] = []
    call = Flaky(OSError("a"), OSError("b"), OSError("c"))
    with pytest.raises(OSError, match=r"^b$"):
        retry_call(call, is_transient=is_os_error, attempts=2, sleep=waits.append)
    assert (call.calls, waits) == (2, [0.0])


def test_another_error_is_raised_at_once() -> None:
    call = Flaky(ValueError("a"))
    with pytest.raises(ValueError, match=r"^a$"):
        retry_call(call, is_transient=is_os_error, attempts=5)
    assert call.calls == 1


@pytest.mark.parametrize(("timeout_s", "calls"), [(0.0, 1), (0.1, 2)])
def test_an_error_after_the_timeout_is_the_last(timeout_s: float, calls: int) -> None:
    """The first attempt fails at 0 s, the second one after the wait of 0.2 s."""
    call = Flaky(*(OSError("down") for _ in range(5)))
    with pytest.raises(OSError, match="down"):
        retry_call(call, is_transient=is_os_error, wait_s=lambda failures: 0.2, timeout_s=timeout_s)
    assert call.calls == calls


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4)])
def test_cores_are_those_of_the_container(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.5 cores can keep two threads busy, half a core one; nine are allowed, but the affinity has four."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    (tmp_path / "cpu.max").write_text(f"{quota}\n", encoding="ascii")
    assert count_cores(tmp_path / "cpu.max") == cores


@pytest.mark.parametrize("content", ["max 100000\n", None])
def test_without_a_quota_cores_are_those_of_the_affinity(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    if content:
        (tmp_path / "cpu.max").write_text(content, encoding="ascii")
    assert count_cores(tmp_path / "cpu.max") == 2


def test_cores_are_shared_as_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000", encoding="ascii")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # so that the end of the test restores it
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    share_cores(tmp_path / "cpu.max")
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("1", "active")


def test_the_server_shares_cores_before_torch_is_loaded() -> None:
    """torch reads the environment when it is imported, and the command line does not import it."""
    code = "import sys; import clincot.cli.app, clincot.serving.server; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
