"""Checks of the data repository: it can be cloned and pushed to, and its DVC remote can be written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clincot.config import PreflightConfig
from clincot.jsonl import InvalidRecord
from clincot.preflight.preflight_report import PreflightCheck, fail_check, pass_check, skip_check
from clincot.preflight.probe import Probe
from clincot.text import format_count

if TYPE_CHECKING:
    from clincot.preferences.versions.git import Git

_DRY_RUN_TAG = "refs/tags/preferences/preflight"  # never actually pushed


def build_repository_probes(config: PreflightConfig) -> list[Probe]:
    """Build the probe of the data repository, which is skipped if no repository is configured."""
    version = config.version
    description = "clone, push rights, and write and read access to the DVC remote"

    def run() -> Iterator[PreflightCheck]:
        if not version.repository:
            reason = "version.repository is empty: the preference data will not be versioned"
            yield skip_check("data repository", description, reason)
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield from check_data_repository(version.repository, version.branch, Path(scratch), config.timeout_s)

    remedy = "check version.repository and the credentials in the environment (CLINCOT_GIT_TOKEN, AWS_…)"
    return [Probe("data repository", description, remedy, config.timeout_s, run)]


def check_data_repository(address: str, branch: str, scratch: Path, timeout_s: float) -> Iterator[PreflightCheck]:
    """Clone into `scratch`, dry-run a push and test the DVC remote.

    A dry run reaches the server's check of push rights; hooks and protected branches only refuse a real push. Raises
    GitFailed, DvcFailed or InvalidInput.
    """
    from clincot.preferences.versions import dvc
    from clincot.preferences.versions.git import clone_repository

    git = clone_repository(address, scratch / "clone", branch=branch, timeout_s=timeout_s)
    yield pass_check("data repository: clone", address)
    probe = f"git push --dry-run of a tag to {address}"
    if git.try_run("rev-parse", "--verify", "--quiet", "HEAD"):
        remedy = "set it up with `clincot data init`"
        yield fail_check("data repository: push", probe, "the repository has no commit yet", remedy)
        return
    error = git.try_run("push", "--dry-run", "--quiet", "origin", f"HEAD:{_DRY_RUN_TAG}")
    if error:
        remedy = "give this account the right to push branches and tags preferences/* (CLINCOT_GIT_TOKEN or an ssh key)"
        yield fail_check("data repository: push", probe, error, remedy)
    else:
        yield pass_check("data repository: push", probe, "allowed")
    yield _check_versions(git, address)
    dvc.write_local_config(git.folder)
    yield pass_check("DVC remote", "write, read and delete a small object", dvc.try_remote(git.folder))


def _check_versions(git: Git, address: str) -> PreflightCheck:
    """Check that every tag of a version is where it was made, since the version of a round is read from them."""
    from clincot.preferences.versions.commit import read_versions

    name, probe = "data repository: versions", "every tag preferences/* holds its own version"
    try:
        versions = read_versions(git, address)
    except InvalidRecord as error:
        return fail_check(name, probe, str(error), "put the tag back, or remove it, with the command named here")
    return pass_check(name, probe, format_count(len(versions), "version"))
