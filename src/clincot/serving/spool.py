"""The temporary folder of a server, which is removed however the server ends.

A server that is killed cannot remove its files. A guard does so, a shell process that does nothing but wait for the
server's end. If that was killed as well, as when a whole container is, the next server in the same place removes them
(a restarted container keeps its /tmp). A folder belongs to a living server as long as its lock file is locked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "clincot-serve-"
# It waits for a line, or for the end of standard input with the server. A decode worker may still write into the folder
# then, so removal is repeated.
_GUARD = """read -r line
tries=30
until rm -rf "$1" && [ ! -e "$1" ] || [ "$tries" -eq 0 ]; do
  tries=$((tries - 1))
  sleep 1
done
rm -f "$1.lock"
"""


@dataclass(frozen=True)
class Spool:
    """The folder of one server."""

    folder: Path

    @contextmanager
    def open_folder(self) -> Iterator[Path]:
        """A folder for the files of one request."""
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as name:
            yield Path(name)


@contextmanager
def open_spool(parent: Path | None = None) -> Iterator[Spool]:
    """Make the folder of a server, after removing those of servers that were killed."""
    place = parent or Path(tempfile.gettempdir())
    _remove_abandoned_folders(place)
    handle, lock = tempfile.mkstemp(prefix=_PREFIX, suffix=".lock", dir=place)
    folder = Path(lock).with_suffix("")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with _guard_folder(folder):
            folder.mkdir(mode=0o700)
            yield Spool(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)
        Path(lock).unlink(missing_ok=True)


@contextmanager
def _guard_folder(folder: Path) -> Iterator[None]:
    """Run the guard of a folder, which removes it at the end of the block, or of this process."""
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "clincot-spool-guard", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.environ.get("PATH", os.defpath)},
        start_new_session=True,  # a signal to the server's process group, such as of a terminal, does not end it
    )
    try:
        yield
    finally:
        guard.communicate(b"\n")


def _remove_abandoned_folders(place: Path) -> None:
    for lock in place.glob(f"{_PREFIX}*.lock"):
        try:
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError, PermissionError):  # in use, gone, or another user's
            continue
