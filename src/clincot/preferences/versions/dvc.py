"""DVC in a clone: its command line adds and pushes files, its library checks what the remote contains.

The remote is configured in the data repository's .dvc/config. S3 takes its credentials (and its endpoint, if that file
names none) from the AWS_… variables. DVC decides where an object is stored; only the check that it exists is done here,
because `dvc push` has reported success without uploading every object (DVC caches what it believes the remote to have).
A remote that is away is waited for (waiting.py): every operation here can be repeated.
"""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from clincot.errors import InvalidInput, UserError
from clincot.preferences.versions.git import build_git_environment, summarize_output
from clincot.waiting import Outage, get_waiting, iter_causes

T = TypeVar("T")
DATA_FOLDER = "preferences"  # what DVC tracks in the data repository
POINTER_FILE = f"{DATA_FOLDER}.dvc"
_EXTRA_NEEDED = "versions need the extra 'cluster': pip install 'clincot[cluster]'"
_REMOTE_HINT = "check the AWS_… variables and the remote in the data repository's .dvc/config"


# What `dvc push` prints about a remote that is away: the messages of botocore, aiohttp and of S3 itself.
_PASSING_ERRORS = re.compile(
    r"Could not connect to the endpoint URL|Connect timeout|Read timeout|Connection was closed|Cannot connect to host|"
    r"Server disconnected|Connection reset|HTTP (?:429|5\d\d)|\((?:429|5\d\d)\)|InternalError|ServiceUnavailable|"
    r"SlowDown|Service Unavailable|Bad Gateway|Please reduce your request rate"
)


class DvcFailed(UserError, RuntimeError):
    """A dvc command failed, or an object is missing from the remote; the message says which and why."""


class DvcRemoteUnavailable(DvcFailed):
    """The remote does not answer, or answers with a server error; the same command may succeed later."""

    def __init__(self, message: str, outage: Outage) -> None:
        super().__init__(message)
        self.outage = outage


def run_dvc(folder: Path, *arguments: str, timeout_s: float) -> str:
    """Run `dvc …` in `folder` and return what it printed. Raises DvcFailed."""
    return _wait_for_remote(lambda: _run_dvc_once(folder, arguments, timeout_s))


def _run_dvc_once(folder: Path, arguments: Sequence[str], timeout_s: float) -> str:
    # No usage analytics; no retries of botocore below those of _wait_for_remote.
    environment = {**build_git_environment(), "DVC_NO_ANALYTICS": "1", "AWS_MAX_ATTEMPTS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise DvcFailed(f"dvc {arguments[0]} did not end within {timeout_s:g} s (version.timeout_s)") from None
    if done.returncode != 0:
        if "No module named dvc" in done.stderr:
            raise DvcFailed(f"{_EXTRA_NEEDED} (DVC is missing)")
        message = f"dvc {arguments[0]} failed: {_parse_dvc_error(done)}; {_REMOTE_HINT}"
        said = _PASSING_ERRORS.search(done.stderr)
        raise DvcFailed(message) if said is None else DvcRemoteUnavailable(message, Outage(said[0]))
    return done.stdout


def _wait_for_remote(call: Callable[[], T]) -> T:
    return get_waiting().call(
        "DVC remote", call, lambda error: error.outage if isinstance(error, DvcRemoteUnavailable) else None
    )


def _parse_dvc_error(done: subprocess.CompletedProcess[str]) -> str:
    """DVC's error lines, without hints."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    errors = [line.removeprefix("ERROR: ").removeprefix("unexpected error - ") for line in lines]
    return " / ".join(errors) or summarize_output(done)


def write_local_config(folder: Path) -> None:
    """Configure this clone: no analytics or update checks, no cache outside the clone, linked instead of copied files.

    Raises InvalidInput if the clone is not a DVC repository.
    """
    if not (folder / ".dvc" / "config").is_file():
        raise InvalidInput(
            f"{_read_origin(folder)}: is not a data repository (it has no .dvc/config); `clincot data init` makes one"
        )
    site_cache = folder / ".dvc" / "tmp" / "site"
    content = (
        f"[core]\n    analytics = false\n    check_update = false\n    site_cache_dir = {site_cache}\n"
        '[cache]\n    type = "reflink,hardlink,copy"\n'
    )
    (folder / ".dvc" / "config.local").write_text(content, encoding="utf-8")


def read_dvc_pointer(content: str, *, where: str) -> tuple[str, int, int]:
    """Parse a committed preferences.dvc to (digest of the folder's listing, bytes, number of files).

    Raises InvalidInput, naming `where`, for anything else.
    """
    try:
        (out,) = yaml.safe_load(content)["outs"]
        return str(out["md5"]), int(out["size"]), int(out["nfiles"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise InvalidInput(f"{where}: expected one folder tracked by DVC, got {content[:200]!r}") from None


def find_missing_objects(folder: Path, objects: Mapping[str, int | None]) -> list[str]:
    """Check every object {digest: bytes} in the remote; return those that are missing or have another size.

    A size of None is not checked. Raises DvcFailed if the remote cannot be accessed or none is configured.
    """

    def find() -> list[str]:
        with _open_remote(folder) as odb:
            missing = []
            for digest, size in objects.items():
                try:
                    actual_size = odb.fs.info(odb.oid_to_path(digest))["size"]
                except FileNotFoundError:
                    missing.append(digest)
                    continue
                if size is not None and actual_size != size:
                    missing.append(digest)
            return missing

    return _wait_for_remote(find)


def try_remote(folder: Path) -> str:
    """Write, read and delete a small object with a unique name; return the remote's address. Raises DvcFailed."""

    def try_once() -> str:
        with _open_remote(folder) as odb:
            path, content = odb.fs.join(odb.path, "preflight", uuid.uuid4().hex), b"preflight\n"
            odb.fs.makedirs(odb.fs.parent(path), exist_ok=True)
            odb.fs.pipe_file(path, content)
            try:
                actual = odb.fs.cat_file(path)
            finally:
                odb.fs.rm_file(path)
            if actual != content:
                raise DvcFailed(f"the DVC remote returned {actual[:40]!r} instead of {content!r}; {_REMOTE_HINT}")
            return str(odb.fs.unstrip_protocol(odb.path))

    return _wait_for_remote(try_once)


def download_from_dvc(folder: Path, revision: str, path: str, to: Path) -> Path:
    """Download a file of the data repository, as of a revision, from the remote to `to`. Raises DvcFailed."""
    to.parent.mkdir(parents=True, exist_ok=True)

    def download() -> Path:
        with _dvc_errors():
            from dvc.api import DVCFileSystem

            DVCFileSystem(str(folder), rev=revision).get_file(path, str(to))
        return to

    return _wait_for_remote(download)


def upload_objects(folder: Path, objects: Mapping[str, Path]) -> None:
    """Upload files {digest: file} that `dvc push` skipped.

    DVC assumes that the files of a folder are in the remote if the folder's listing is.
    """

    def upload() -> None:
        with _open_remote(folder) as odb:
            from dvc.fs import LocalFileSystem

            for digest, path in objects.items():
                odb.add(str(path), LocalFileSystem(), digest, check_exists=False)

    _wait_for_remote(upload)


@contextmanager
def _open_remote(folder: Path) -> Iterator[Any]:
    """The remote's object database, with its cached listing invalidated."""
    with _dvc_errors():
        from dvc.repo import Repo

        with Repo(str(folder)) as repo:
            odb = repo.cloud.get_remote_odb(command="push")
            getattr(odb.fs.fs, "invalidate_cache", lambda: None)()
            yield odb


@contextmanager
def _dvc_errors() -> Iterator[None]:
    """Turn errors of DVC and of the remote into DvcFailed."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
        from dvc.exceptions import DvcException
    except ModuleNotFoundError as error:
        raise DvcFailed(f"{_EXTRA_NEEDED} ({error})") from None
    try:
        yield
    except (DvcException, OSError, BotoCoreError, ClientError) as error:
        named = str(error) if isinstance(error, DvcException) else f"{type(error).__name__}: {error}"
        message, outage = f"the DVC remote cannot be accessed: {named}; {_REMOTE_HINT}", _find_outage(error)
        raise (DvcFailed(message) if outage is None else DvcRemoteUnavailable(message, outage)) from None


def _find_outage(error: BaseException) -> Outage | None:
    """Return why the remote, of S3 or another one, could not be reached, if that passes."""
    from clincot.storage.boto_errors import find_store_outage

    cut = next((one for one in iter_causes(error) if isinstance(one, ConnectionError | TimeoutError)), None)
    return find_store_outage(error) or (None if cut is None else Outage(type(cut).__name__))


def _read_origin(folder: Path) -> str:
    from clincot.preferences.versions.git import Git

    return Git(folder, 60)("remote", "get-url", "origin").strip()
