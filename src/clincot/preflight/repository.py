"""Can the round's preference data be kept: the data repository cloned, its DVC remote written, the push allowed?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from clincot.config import PreflightSection
from clincot.preflight.preflight_report import Check, failed, passed, skipped
from clincot.preflight.probe import Probe

_TAG = "refs/tags/preferences/preflight"  # what is never really pushed


def probes(section: PreflightSection) -> list[Probe]:
    version = section.version
    tried = "clone, push rights, and the DVC remote written and read"

    def run() -> Iterator[Check]:
        if not version.repository:
            yield skipped(
                "data repository", tried, "none is named (version.repository): the data will not be versioned"
            )
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield from look(version.repository, version.branch, Path(scratch), section.timeout_s)

    mend = "check version.repository and the credentials in the environment (CLINCOT_GIT_TOKEN, AWS_…)"
    return [Probe("data repository", tried, mend, section.timeout_s, run)]


def look(address: str, branch: str, scratch: Path, timeout_s: float) -> Iterator[Check]:
    """Clone into `scratch`, push without pushing, and try the remote. Raises GitFailed, DvcFailed, BadInput.

    A dry run goes as far as the server's permission to push; what its hooks and protected branches refuse shows only
    in a real push.
    """
    from clincot.preferences.versions import dvc
    from clincot.preferences.versions.git import clone

    git = clone(address, scratch / "clone", branch=branch, timeout_s=timeout_s)
    yield passed("data repository: clone", address)
    tried = f"git push --dry-run of a tag to {address}"
    if git.tried("rev-parse", "--verify", "--quiet", "HEAD"):
        yield failed("data repository: push", tried, "it has no commit yet", "make it one with `clincot data init`")
        return
    wrong = git.tried("push", "--dry-run", "--quiet", "origin", f"HEAD:{_TAG}")
    if wrong:
        mend = "give this account the right to push branches and tags preferences/* (CLINCOT_GIT_TOKEN or an ssh key)"
        yield failed("data repository: push", tried, wrong, mend)
    else:
        yield passed("data repository: push", tried, "allowed")
    dvc.quieted(git.folder)
    yield passed("DVC remote", "write, read and delete a small object", dvc.try_remote(git.folder))
