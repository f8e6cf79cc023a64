"""Create a data repository: git for the digests and tags, a DVC remote for the files."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from clincot.errors import InvalidInput
from clincot.preferences.versions.dvc import DATA_FOLDER, run_dvc
from clincot.preferences.versions.git import (
    Git,
    GitFailed,
    build_git_environment,
    check_address,
    clone_repository,
    summarize_output,
)

README_TEXT = """\
# Preference data

Every tag `preferences/LINE/round-NNNN` is the preference data of one round of a model line: `preferences.json` says
what it is, and DVC holds the files.

    git checkout preferences/LINE/round-0001 && dvc pull

Written by `clincot version`; read by `clincot data log` and `clincot data diff`.
"""
DEFAULT_BRANCH = "main"


def init_repository(address: str, remote: str, *, endpoint: str = "", timeout_s: float = 600.0) -> None:
    """Make the first commit of the (empty) git repository at `address`, whose files go to the DVC remote `remote`.

    remote: s3://bucket/prefix, or any other address that DVC accepts. endpoint: address of an S3 service other than
    Amazon's; "" takes it from the environment (AWS_ENDPOINT_URL_S3). A folder that does not exist yet becomes a bare
    repository. Repeating the call changes nothing. Raises InvalidInput if the repository has another remote, GitFailed,
    DvcFailed.
    """
    check_address(address)
    if "@" in remote.partition("://")[2]:
        raise InvalidInput(
            "the remote's address contains credentials; set them in the environment instead (AWS_… variables)"
        )
    if "://" not in remote:
        remote = str(Path(remote).absolute())
    if "://" not in address and ":" not in address and not Path(address).exists():
        _init_bare_repository(Path(address))
    with tempfile.TemporaryDirectory() as scratch:
        git = clone_repository(address, Path(scratch) / "clone", branch="", timeout_s=timeout_s)
        if (git.folder / ".dvc" / "config").is_file():
            existing = run_dvc(git.folder, "config", "remote.data.url", timeout_s=timeout_s).strip()
            if existing != remote:
                raise InvalidInput(f"{address}: is a data repository already, whose files go to {existing}")
            return
        _write_first_commit(git, remote, endpoint, timeout_s)
        branch = git("rev-parse", "--abbrev-ref", "HEAD").strip()
        git("push", "--quiet", "origin", f"HEAD:refs/heads/{branch}")


def _init_bare_repository(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = ["git", "init", "--quiet", "--bare", f"--initial-branch={DEFAULT_BRANCH}", str(folder)]
    done = subprocess.run(command, env=build_git_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GitFailed(f"{folder}: git init failed: {summarize_output(done)}")


def _write_first_commit(git: Git, remote: str, endpoint: str, timeout_s: float) -> None:
    run_dvc(git.folder, "init", "--quiet", timeout_s=timeout_s)
    run_dvc(git.folder, "remote", "add", "--default", "data", remote, timeout_s=timeout_s)
    if endpoint:
        run_dvc(git.folder, "remote", "modify", "data", "endpointurl", endpoint, timeout_s=timeout_s)
    if not (git.folder / "README.md").exists():
        (git.folder / "README.md").write_text(README_TEXT, encoding="utf-8")
    with (git.folder / ".gitignore").open("a", encoding="utf-8") as ignored:
        ignored.write(f"/{DATA_FOLDER}\n")
    git("add", "--all")
    git("commit", "--quiet", "--no-gpg-sign", "--message=A data repository for preference data")
