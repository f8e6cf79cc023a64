"""The temporary folder of a server, which is removed however the server ends.

A server that is killed cannot remove its files. Its decode worker does so when it sees the server's end
(decode_worker.py); if that was killed as well, the next server in the same place does (a restarted container keeps its
/tmp). A folder belongs to a living server as long as its lock file is locked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "clincot-serve-"


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
        folder.mkdir(mode=0o700)
        yield Spool(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.unlink(lock)
        os.close(handle)


def _remove_abandoned_folders(place: Path) -> None:
    for lock in place.glob(f"{_PREFIX}*.lock"):
        try:
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError, PermissionError):  # in use, gone, or another user's
            continue
