"""A new data repository: git for the names, a DVC remote for the files."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from clincot.errors import BadInput
from clincot.preferences.versions.dvc import FOLDER, dvc
from clincot.preferences.versions.git import Git, GitFailed, checked_address, clone, environment, said

README = """\
# Preference data

Every tag `preferences/round-NNNN` is the preference data of one round: `preferences.json` says what it is, and DVC
holds the files.

    git checkout preferences/round-0001 && dvc pull

Written by `clincot version`; read by `clincot data log` and `clincot data diff`.
"""
BRANCH = "main"


def start_repository(address: str, remote: str, *, endpoint: str = "", timeout_s: float = 600.0) -> None:
    """Make the first commit of the (empty) git repository at `address`, whose files go to the DVC remote `remote`.

    remote: s3://bucket/prefix, or whatever else DVC takes; endpoint: of an S3 that is not Amazon's, "" where the
    environment says it (AWS_ENDPOINT_URL_S3). A folder that does not exist yet becomes a bare repository. Doing it
    again changes nothing. Raises BadInput where something else lies there, GitFailed, DvcFailed.
    """
    checked_address(address)
    if "@" in remote.partition("://")[2]:
        raise BadInput("the remote's address holds credentials; they come from the environment (AWS_… variables)")
    if "://" not in remote:
        remote = str(Path(remote).absolute())
    if "://" not in address and ":" not in address and not Path(address).exists():
        _bare(Path(address))
    with tempfile.TemporaryDirectory() as scratch:
        git = clone(address, Path(scratch) / "clone", branch="", timeout_s=timeout_s)
        if (git.folder / ".dvc" / "config").is_file():
            found = dvc(git.folder, "config", "remote.data.url", timeout_s=timeout_s).strip()
            if found != remote:
                raise BadInput(f"{address}: is a data repository already, whose files go to {found}")
            return
        _first_commit(git, remote, endpoint, timeout_s)
        branch = git("rev-parse", "--abbrev-ref", "HEAD").strip()
        git("push", "--quiet", "origin", f"HEAD:refs/heads/{branch}")


def _bare(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = ["git", "init", "--quiet", "--bare", f"--initial-branch={BRANCH}", str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GitFailed(f"{folder}: could not be made a git repository: {said(done)}")


def _first_commit(git: Git, remote: str, endpoint: str, timeout_s: float) -> None:
    dvc(git.folder, "init", "--quiet", timeout_s=timeout_s)
    dvc(git.folder, "remote", "add", "--default", "data", remote, timeout_s=timeout_s)
    if endpoint:
        dvc(git.folder, "remote", "modify", "data", "endpointurl", endpoint, timeout_s=timeout_s)
    if not (git.folder / "README.md").exists():
        (git.folder / "README.md").write_text(README, encoding="utf-8")
    with (git.folder / ".gitignore").open("a", encoding="utf-8") as ignored:
        ignored.write(f"/{FOLDER}\n")
    git("add", "--all")
    git("commit", "--quiet", "--no-gpg-sign", "--message=A data repository for preference data")
