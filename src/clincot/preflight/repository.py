"""Can the round's preference data be kept: the data repository cloned, its DVC remote written, the push allowed?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from clincot.config import PreflightConfig
from clincot.preflight.preflight_report import PreflightCheck, fail_check, pass_check, skip_check
from clincot.preflight.probe import Probe

_DRY_RUN_TAG = "refs/tags/preferences/preflight"  # what is never really pushed


def build_repository_probes(config: PreflightConfig) -> list[Probe]:
    version = config.version
    tried = "clone, push rights, and the DVC remote written and read"

    def run() -> Iterator[PreflightCheck]:
        if not version.repository:
            yield skip_check(
                "data repository", tried, "none is named (version.repository): the data will not be versioned"
            )
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield from check_data_repository(version.repository, version.branch, Path(scratch), config.timeout_s)

    mend = "check version.repository and the credentials in the environment (CLINCOT_GIT_TOKEN, AWS_…)"
    return [Probe("data repository", tried, mend, config.timeout_s, run)]


def check_data_repository(address: str, branch: str, scratch: Path, timeout_s: float) -> Iterator[PreflightCheck]:
    """Clone into `scratch`, push without pushing, and try the remote. Raises GitFailed, DvcFailed, BadInput.

    A dry run goes as far as the server's permission to push; what its hooks and protected branches refuse shows only
    in a real push.
    """
    from clincot.preferences.versions import dvc
    from clincot.preferences.versions.git import clone_repository

    git = clone_repository(address, scratch / "clone", branch=branch, timeout_s=timeout_s)
    yield pass_check("data repository: clone", address)
    tried = f"git push --dry-run of a tag to {address}"
    if git.try_run("rev-parse", "--verify", "--quiet", "HEAD"):
        yield fail_check("data repository: push", tried, "it has no commit yet", "make it one with `clincot data init`")
        return
    wrong = git.try_run("push", "--dry-run", "--quiet", "origin", f"HEAD:{_DRY_RUN_TAG}")
    if wrong:
        mend = "give this account the right to push branches and tags preferences/* (CLINCOT_GIT_TOKEN or an ssh key)"
        yield fail_check("data repository: push", tried, wrong, mend)
    else:
        yield pass_check("data repository: push", tried, "allowed")
    dvc.write_local_config(git.folder)
    yield pass_check("DVC remote", "write, read and delete a small object", dvc.try_remote(git.folder))
