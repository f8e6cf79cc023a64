"""DVC in a clone: its command line adds and pushes, its library is asked what really lies in the remote.

The remote stands in the data repository's .dvc/config; S3 takes its credentials (and, where that file names none, its
endpoint) from the AWS_… variables. DVC is left to say where an object lies; only the question "is it there?" is ours,
since a push that was told to be done has been known not to be (DVC remembers what it believes to be there).
"""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from clincot.errors import InvalidInput, UserError
from clincot.preferences.versions.git import build_git_environment, summarize_output

DATA_FOLDER = "preferences"  # what DVC tracks in the data repository
POINTER_FILE = f"{DATA_FOLDER}.dvc"
_EXTRA_NEEDED = "versions need the extra 'cluster': pip install 'clincot[cluster]'"
_REMOTE_HINT = "check the AWS_… variables and the remote in the data repository's .dvc/config"


class DvcFailed(UserError, RuntimeError):
    """A dvc command failed, or an object is not where it should be; says which and why."""


def run_dvc(folder: Path, *arguments: str, timeout_s: float) -> str:
    """What `dvc …` printed, run in `folder`. Raises DvcFailed."""
    own = {"DVC_NO_ANALYTICS": "1"}  # nobody is told of our runs
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=folder,
            env={**build_git_environment(), **own},
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
        raise DvcFailed(f"dvc {arguments[0]} failed: {_parse_dvc_error(done)}; {_REMOTE_HINT}")
    return done.stdout


def _parse_dvc_error(done: subprocess.CompletedProcess[str]) -> str:
    """What DVC calls the error, without its courtesies."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    return " / ".join(
        line.removeprefix("ERROR: ").removeprefix("unexpected error - ") for line in lines
    ) or summarize_output(done)


def write_local_config(folder: Path) -> None:
    """Settings of this clone alone: no calls home, nothing remembered elsewhere, files linked and not copied again."""
    if not (folder / ".dvc" / "config").is_file():
        raise InvalidInput(
            f"{_read_origin(folder)}: is no data repository (it has no .dvc/config); `clincot data init` makes one"
        )
    remembers = folder / ".dvc" / "tmp" / "site"
    own = (
        f"[core]\n    analytics = false\n    check_update = false\n    site_cache_dir = {remembers}\n"
        '[cache]\n    type = "reflink,hardlink,copy"\n'
    )
    (folder / ".dvc" / "config.local").write_text(own, encoding="utf-8")


def read_dvc_pointer(content: str, *, where: str) -> tuple[str, int, int]:
    """What a committed preferences.dvc points at: (digest of the folder's listing, bytes, files)."""
    try:
        (out,) = yaml.safe_load(content)["outs"]
        return str(out["md5"]), int(out["size"]), int(out["nfiles"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise InvalidInput(f"{where}: expected one folder tracked by DVC, got {content[:200]!r}") from None


def find_missing_objects(folder: Path, objects: Mapping[str, int | None]) -> list[str]:
    """Which of the objects {digest: bytes, None: whatever} do not lie whole in the remote; every one is asked for.

    Raises DvcFailed where the remote cannot be asked, BadInput where there is none or it names objects otherwise.
    """
    with _open_remote(folder) as odb:
        absent = []
        for digest, size in objects.items():
            place = odb.oid_to_path(digest)
            try:
                found = odb.fs.info(place)["size"]
            except FileNotFoundError:
                absent.append(digest)
                continue
            if size is not None and found != size:
                absent.append(digest)
        return absent


def try_remote(folder: Path) -> str:
    """Write, read and delete a small object of its own name in the remote; its address. Raises DvcFailed."""
    with _open_remote(folder) as odb:
        place, written = odb.fs.join(odb.path, "preflight", uuid.uuid4().hex), b"preflight\n"
        odb.fs.makedirs(odb.fs.parent(place), exist_ok=True)
        odb.fs.pipe_file(place, written)
        try:
            found = odb.fs.cat_file(place)
        finally:
            odb.fs.rm_file(place)
        if found != written:
            raise DvcFailed(f"the DVC remote gave back {found[:40]!r} for {written!r}; {_REMOTE_HINT}")
        return str(odb.fs.unstrip_protocol(odb.path))


def download_from_dvc(folder: Path, revision: str, path: str, to: Path) -> Path:
    """A file of the data repository as it was at a revision, from the remote. Raises DvcFailed."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with _dvc_errors():
        from dvc.api import DVCFileSystem

        DVCFileSystem(str(folder), rev=revision).get_file(path, str(to))
    return to


def upload_objects(folder: Path, objects: Mapping[str, Path]) -> None:
    """Send files {digest: file} that a push left out: where a folder's listing is, DVC takes its files to be too."""
    with _open_remote(folder) as odb:
        from dvc.fs import LocalFileSystem

        for digest, path in objects.items():
            odb.add(str(path), LocalFileSystem(), digest, check_exists=False)


@contextmanager
def _open_remote(folder: Path) -> Iterator[Any]:
    """The remote's store of objects."""
    with _dvc_errors():
        from dvc.repo import Repo

        with Repo(str(folder)) as repo:
            odb = repo.cloud.get_remote_odb(command="push")
            getattr(odb.fs.fs, "invalidate_cache", lambda: None)()
            yield odb


@contextmanager
def _dvc_errors() -> Iterator[None]:
    """Errors of DVC and of the remote as errors for the user."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
        from dvc.exceptions import DvcException
    except ModuleNotFoundError as error:
        raise DvcFailed(f"{_EXTRA_NEEDED} ({error})") from None
    try:
        yield
    except DvcException as error:
        raise DvcFailed(f"the DVC remote cannot be asked: {error}; {_REMOTE_HINT}") from None
    except (OSError, BotoCoreError, ClientError) as error:
        raise DvcFailed(f"the DVC remote cannot be asked: {type(error).__name__}: {error}; {_REMOTE_HINT}") from None


def _read_origin(folder: Path) -> str:
    from clincot.preferences.versions.git import Git

    return Git(folder, 60)("remote", "get-url", "origin").strip()
