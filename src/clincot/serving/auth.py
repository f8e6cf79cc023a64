"""API keys from a mounted secret: read again when it changes, compared in constant time, never shown."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from clincot.errors import InvalidInput
from clincot.serving.api_errors import ApiError

_LOG = logging.getLogger("clincot.serve")
_FileStamp = tuple[tuple[str, int, int, int], ...]


class ApiKeys:
    """The keys of a file (one a line, # starts a comment) or of all files of a folder, as a Secret is mounted.

    The files are looked at on every request and read again when their inode, size or time has changed, so a rotated
    secret counts from the next request on. Where no key is left, or the files cannot be read, nobody is let in.
    Raises ValueError at the start where there is no key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: _FileStamp = ()
        self._digests: tuple[bytes, ...] = ()
        self._reload_keys()
        if not self._digests:
            raise InvalidInput(f"{path}: holds no API key; expected one a line (or a folder of such files)")

    def check_authorization(self, authorization: str | None) -> None:
        """Raises Refused (401) unless it is `Bearer KEY` of a key that counts now."""
        self._reload_keys()
        scheme, _, given = (authorization or "").partition(" ")
        offered = hashlib.sha256(given.strip().encode()).digest()
        # every key is compared, whichever fits: the time tells nothing
        fits = [hmac.compare_digest(offered, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(fits):
            raise ApiError(401, "invalid_api_key", "expected the header 'Authorization: Bearer KEY' with a valid key")

    def _reload_keys(self) -> None:
        try:
            files = self._list_files()
            stamp = tuple((str(f), s.st_ino, s.st_size, s.st_mtime_ns) for f in files if (s := f.stat()))
            if stamp == self._stamp:
                return
            lines = [line.partition("#")[0].strip() for f in files for line in f.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            if self._digests or not self._stamp:
                _LOG.error("API keys: %s cannot be read (%s); nobody is let in", self.path, type(error).__name__)
            self._stamp, self._digests = (("unreadable", 0, 0, 0),), ()
            return
        self._stamp = stamp
        self._digests = tuple(hashlib.sha256(line.encode()).digest() for line in lines if line)
        _LOG.info("API keys: %d read from %s", len(self._digests), self.path)

    def _list_files(self) -> list[Path]:
        if self.path.is_dir():  # Kubernetes keeps its own links there, their names start with two dots
            return sorted(p for p in self.path.iterdir() if p.is_file() and not p.name.startswith(".."))
        return [self.path]
