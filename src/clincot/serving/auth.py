"""API keys from a mounted secret.

They are read again when the secret changes, compared in constant time, and never logged.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
from collections.abc import Sequence
from pathlib import Path

from clincot.errors import InvalidInput
from clincot.serving.api_errors import ApiError

_LOG = logging.getLogger("clincot.serve")
_FileStamp = tuple[tuple[str, int, int, int], ...]


class ApiKeys:
    """The valid keys of one file, or of all files in a folder.

    A Secret is mounted as a folder. A file contains one key per line; # starts a comment. Every request checks inode,
    size and modification time of the files and reads them again if they have changed, so a rotated secret is used from
    the next request on. If no key is left, or the files cannot be read, all requests are refused. The constructor
    raises InvalidInput if it finds no key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: _FileStamp = ()
        self._digests: tuple[bytes, ...] = ()
        self._reload_keys()
        if not self._digests:
            raise InvalidInput(
                f"{path}: contains no API key; expected a file with one key per line, or a folder of such files"
            )

    def check_authorization(self, authorization: str | None) -> None:
        """Raise ApiError (401) unless the header is `Bearer KEY`, or a browser's `Basic` with the key as password."""
        self._reload_keys()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() == "basic":
            key = _read_password(key)
        offered = hashlib.sha256(key.strip().encode()).digest()
        # compare with every key, even after a match, so that the response time reveals nothing
        matches = [hmac.compare_digest(offered, digest) for digest in self._digests]
        if scheme.lower() not in ("bearer", "basic") or not any(matches):
            raise ApiError(401, "invalid_api_key", "expected the header 'Authorization: Bearer KEY' with a valid key")

    def _reload_keys(self) -> None:
        try:
            files = self._list_files()
            stamp = tuple(_stamp_file(path) for path in files)
            if stamp == self._stamp:
                return
            keys = _read_keys(files)
        except (OSError, UnicodeDecodeError) as error:
            if self._digests or not self._stamp:
                _LOG.error("API keys: cannot read %s (%s); all requests are refused", self.path, type(error).__name__)
            self._stamp, self._digests = (("unreadable", 0, 0, 0),), ()
            return
        self._stamp = stamp
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        _LOG.info("API keys: read %d from %s", len(self._digests), self.path)

    def _list_files(self) -> list[Path]:
        if self.path.is_dir():
            # Kubernetes keeps its own links in a mounted Secret; their names start with two dots
            return sorted(path for path in self.path.iterdir() if path.is_file() and not path.name.startswith(".."))
        return [self.path]


def _read_password(credentials: str) -> str:
    """The password of RFC 7617's user:password in base64; "" if there is none, which is no key."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _stamp_file(path: Path) -> tuple[str, int, int, int]:
    status = path.stat()
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns


def _read_keys(files: Sequence[Path]) -> list[str]:
    keys = []
    for path in files:
        for line in path.read_text("utf-8").splitlines():
            key = line.partition("#")[0].strip()
            if key:
                keys.append(key)
    return keys
