"""Temporary files never outlive a server, however it and its processes end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from clincot.serving import decode_worker
from clincot.serving.spool import open_spool
from tests.serving.conftest import POLICY
from tests.support.model_servers import PREDICT, serving, until, v1

CRASH = """
import os, pathlib, psutil, sys
from clincot.serving.spool import open_spool
with open_spool(pathlib.Path(sys.argv[1])) as spool:
    (spool.folder / "film.png").write_bytes(b"a patient's film")
    print(spool.folder, flush=True)
    {end}
"""


def run_until(end: str, place: Path) -> Path:
    """Run a server's spool in a process of its own that ends by `end`; returns the spool's folder."""
    done = subprocess.run([sys.executable, "-c", CRASH.format(end=end), str(place)], capture_output=True, text=True)
    return Path(done.stdout.strip())


def test_a_folder_is_removed_at_the_end(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool, spool.open_folder() as folder:
        (folder / "upload").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_the_guard_removes_the_files_of_a_killed_process(tmp_path: Path) -> None:
    """As when a server is killed while it downloads a checkpoint, before it has any other process."""
    left = run_until("os.kill(os.getpid(), 9)", tmp_path)
    assert left.name.startswith("clincot-serve-")
    until(lambda: list(tmp_path.iterdir()) == [], timeout_s=30)  # its lock file is removed, too


def test_the_next_server_removes_what_a_killed_container_left(tmp_path: Path) -> None:
    """The guard is killed with the server."""
    kill_all = "[child.kill() for child in psutil.Process().children()]; os.kill(os.getpid(), 9)"
    left = run_until(kill_all, tmp_path)
    assert (left / "film.png").exists()
    with open_spool(tmp_path):
        assert not left.exists()


def test_the_folder_of_a_living_server_is_kept(tmp_path: Path) -> None:
    with open_spool(tmp_path) as first, open_spool(tmp_path) as second:
        assert first.folder.is_dir()
        assert first.folder != second.folder


@pytest.mark.slow
def test_nothing_remains_of_a_killed_server_without_its_decoder(
    film: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode worker is killed first, then its server while requests are in progress; no second server starts."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    with serving(tmp_path / "log", "--checkpoint", str(POLICY)) as server:
        server.wait_ready()
        assert httpx.post(server.url + PREDICT, json=v1("Is there a nodule?", film), timeout=600).status_code == 200
        (folder,) = [path for path in place.iterdir() if path.is_dir() and path.name.startswith("clincot-serve-")]
        (folder / "film.png").write_bytes(b"of a request in progress")
        children = psutil.Process(server.process.pid).children()
        workers = [child for child in children if decode_worker.__name__ in child.cmdline()]
        assert len(workers) == 1
        for process in (*workers, server.process):
            os.kill(process.pid, signal.SIGKILL)
        until(lambda: not folder.exists(), timeout_s=30)
