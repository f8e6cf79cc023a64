"""Commit a version to the data repository.

    preferences/           the files, tracked by DVC as one folder (preferences.dvc)
    preferences.json       the DataVersion, so that `clincot data log` needs none of the files
    tag preferences/nodules/round-0001    one commit, one tag, one round of one model line

The order of the steps makes an interruption harmless: push the files to the DVC remote, verify that every object
arrived, then push the commit and its tag to git. After an interruption the call is simply repeated: objects that are in
the remote are not uploaded twice, and an unpushed commit is discarded. Files that already have a version do not get
another one. If others pushed in the meantime, the version is committed on top of theirs as whole files: a pointer file
merged line by line would not match any data.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from clincot.config import VersionConfig
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord, parse_record, read_json_model
from clincot.preferences.versions.describe import FILE_NAMES, describe_version
from clincot.preferences.versions.dvc import (
    DATA_FOLDER,
    POINTER_FILE,
    DvcFailed,
    find_missing_objects,
    read_dvc_pointer,
    run_dvc,
    upload_objects,
    write_local_config,
)
from clincot.preferences.versions.git import Git, GitFailed, clone_repository
from clincot.preferences.versions.tags import (
    TAG_NAMESPACE,
    DataOrigin,
    build_version_tag,
    is_version_tag,
    sort_versions,
)
from clincot.processes import retry_call
from clincot.records import DataVersion

DATA_VERSION_FILE = "preferences.json"
_log = logging.getLogger(__name__)


class RoundAlreadyVersioned(InvalidInput):
    """The round's tag holds other preference data; the message says whose."""


def commit_version(config: VersionConfig, inputs: Mapping[str, Path], output: Path) -> DataVersion:
    """Commit the files as the version of a round (see tags.py).

    inputs: those of the version stage; `origin` says whose round the data is. The temporary clone is next to `output`.
    Without a configured repository nothing is committed and the returned version says so (`unversioned`). Raises
    InvalidRecord (files that do not belong together, a tag that was moved), DvcFailed, GitFailed,
    RoundAlreadyVersioned.
    """
    origin = read_json_model(inputs["origin"], DataOrigin) if "origin" in inputs else DataOrigin()
    files = {name: path for name, path in inputs.items() if name != "origin"}
    described = describe_version(files)
    if not config.repository:
        why = "no data repository is named (version.repository); the files are where the round left them"
        _log.warning("the preference data is not versioned: %s", why)
        return DataVersion.model_validate({**described.model_dump(), "unversioned": why})
    # The run stays out of a version that is not committed: its record is an input of the training, whose cached result
    # a later run of the same round uses.
    described = described.model_copy(
        update={"line": origin.line, "run": origin.run, "round": config.round or origin.round}
    )
    with open_temporary_clone(config, output.with_name(f"{output.name}.clone")) as git:
        existing = _find_existing_version(git, config, described, read_versions(git, config.repository))
        if existing is None or missing_objects(git, existing):
            _push_files(git, config, described, files)
        return existing or _push_version(git, config, described)


@contextmanager
def open_temporary_clone(config: VersionConfig, folder: Path) -> Iterator[Git]:
    """A clone of the data repository, deleted afterwards; a clone left by a killed run is replaced."""
    folder = folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        git = clone_repository(config.repository, folder, branch=config.branch, timeout_s=config.timeout_s)
        write_local_config(folder)
        yield git
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_versions(git: Git, repository: str) -> list[DataVersion]:
    """All versions of a clone, by line and round. Raises InvalidRecord for a tag without its own version."""
    # %(*objectname) is the commit of an annotated tag, and empty for a lightweight one, whose objectname is the commit
    rows = git("for-each-ref", "--format=%(refname:strip=2) %(objectname) %(*objectname)", f"refs/tags/{TAG_NAMESPACE}")
    tags = [row.split() for row in rows.splitlines() if is_version_tag(row.split()[0])]
    contents = _read_version_files(git, [tag[-1] for tag in tags])
    versions = []
    for (name, *_, commit), content in zip(tags, contents, strict=True):
        if content is None:
            raise InvalidRecord(
                f"{repository}: the tag {name} holds no {DATA_VERSION_FILE}; tags of this name are reserved for "
                f"versions. {_suggest_tag_repair(git, name)}"
            )
        version = parse_record(content, DataVersion, where=f"{repository} {name}:{DATA_VERSION_FILE}")
        if version.tag != name:
            raise InvalidRecord(
                f"{repository}: the tag {name} holds the version of {version.tag}, so it was moved. "
                f"{_suggest_tag_repair(git, name)}"
            )
        versions.append(version.model_copy(update={"revision": commit, "repository": repository}))
    return sort_versions(versions)


def _read_version_files(git: Git, commits: Sequence[str]) -> list[str | None]:
    """The content of preferences.json in every commit; None where there is none."""
    if not commits:
        return []
    blobs = git("cat-file", "--batch", stdin="".join(f"{commit}:{DATA_VERSION_FILE}\n" for commit in commits)).encode()
    contents: list[str | None] = []
    offset = 0
    for _ in commits:  # `cat-file --batch` prints "<id> blob <bytes>", the content and a newline, or "<name> missing"
        head, _, _ = blobs[offset:].partition(b"\n")
        start = offset + len(head) + 1
        if not head.split()[-1].isdigit():
            contents.append(None)
            offset = start
            continue
        size = int(head.split()[-1])
        contents.append(blobs[start : start + size].decode())
        offset = start + size + 1
    return contents


def _suggest_tag_repair(git: Git, name: str) -> str:
    """The commands that put a tag back where it was, or remove it if no commit of the branch was made for it."""
    commits = git("log", "--format=%H", "--", DATA_VERSION_FILE).split()
    for commit, content in zip(commits, _read_version_files(git, commits), strict=True):
        if content is not None and json.loads(content).get("tag") == name:
            return (
                f"In a clone of the repository, put it back: git tag --force --annotate {name} {commit} -m restored && "
                f"git push --force origin refs/tags/{name}"
            )
    return f"No commit of the branch was made for it; remove it: git push --delete origin {name}"


def missing_objects(git: Git, version: DataVersion) -> list[str]:
    """Objects of a committed version that are missing from the DVC remote."""
    listing, _, _ = read_dvc_pointer(
        git("show", f"{version.revision}:{POINTER_FILE}"), where=f"{version.tag}:{POINTER_FILE}"
    )
    return find_missing_objects(git.folder, _list_objects(version, listing))


def _list_objects(version: DataVersion, listing: str) -> dict[str, int | None]:
    """{digest: size} of a version's objects; the size of the folder listing is unknown (None)."""
    return {listing: None} | {file.md5: file.size for file in version.files}


def _find_existing_version(
    git: Git, config: VersionConfig, described: DataVersion, versions: Sequence[DataVersion]
) -> DataVersion | None:
    """The version that these files already have in their line, if any.

    Raises RoundAlreadyVersioned if the configured round has a version of other files.
    """
    same = None
    for version in versions:
        if version.line != described.line:
            continue
        if config.round and version.round == config.round and version.sha256 != described.sha256:
            when = git("log", "-1", "--format=%an, %ai", version.revision).strip()
            raise RoundAlreadyVersioned(
                f"{config.repository}: {version.tag} holds other preference data ({version.pairs} pairs, "
                f"{version.sha256[:12]}, of {when}); this round's is {described.sha256[:12]}. Choose another "
                "version.round, or 0 for the next free one"
            )
        if version.sha256 == described.sha256 and described.round in (0, version.round) and same is None:
            same = version
    return same


def _choose_tag(described: DataVersion, versions: Sequence[DataVersion]) -> tuple[int, str]:
    """The round of the data, or the next one of its line, and the first tag of that round that is free."""
    rounds = [version.round for version in versions if version.line == described.line]
    number = described.round or max(rounds, default=0) + 1
    taken = {version.tag for version in versions}
    tags = (build_version_tag(described.line, number, again) for again in itertools.count(1))
    return number, next(tag for tag in tags if tag not in taken)


def _push_files(git: Git, config: VersionConfig, described: DataVersion, inputs: Mapping[str, Path]) -> None:
    """Add and push the files, then verify every object. Raises DvcFailed if one did not arrive."""
    folder = git.folder / DATA_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, path in inputs.items():
        shutil.copyfile(path, folder / FILE_NAMES[name])
    run_dvc(git.folder, "add", DATA_FOLDER, timeout_s=config.timeout_s)
    listing, size, count = read_dvc_pointer((git.folder / POINTER_FILE).read_text(encoding="utf-8"), where=POINTER_FILE)
    if (size, count) != (described.size, len(described.files)):
        raise DvcFailed(
            f"DVC tracks {count} files with {size} bytes, the round has {len(described.files)} with {described.size}: "
            "the files changed while they were being read"
        )
    run_dvc(git.folder, "push", POINTER_FILE, timeout_s=config.timeout_s)
    names = {file.md5: file.name for file in described.files}
    absent = find_missing_objects(git.folder, _list_objects(described, listing))
    # `dvc push` skips the files of a folder whose listing is already in the remote, even if some of them are missing
    if skipped := {digest: folder / names[digest] for digest in absent if digest in names}:
        upload_objects(git.folder, skipped)
        absent = find_missing_objects(git.folder, _list_objects(described, listing))
    if absent:
        missing = ", ".join(f"{names.get(digest, 'the listing')} ({digest})" for digest in absent)
        raise DvcFailed(f"pushed, but not in the DVC remote: {missing}; nothing was committed. Run the stage again")


def _push_version(git: Git, config: VersionConfig, described: DataVersion) -> DataVersion:
    """Commit, tag and push; after a conflict with another push, retry on top of it, at most version.attempts times."""
    branch = git("rev-parse", "--abbrev-ref", "HEAD").strip()
    pointer = (git.folder / POINTER_FILE).read_bytes()

    def push_once() -> DataVersion:
        versions = read_versions(git, config.repository)
        existing = _find_existing_version(git, config, described, versions)
        if existing is not None:  # another run of this round has pushed the same files in the meantime
            return existing
        number, tag = _choose_tag(described, versions)
        version = described.model_copy(update={"round": number, "tag": tag})
        before = _read_remote_head(git, branch)
        _commit_and_tag(git, version, pointer, before)
        refs = (f"HEAD:refs/heads/{branch}", f"refs/tags/{version.tag}")
        refused = git.try_run("push", "--quiet", "--atomic", "origin", *refs)  # both or neither
        if not refused:
            revision = git("rev-parse", "HEAD").strip()
            return version.model_copy(update={"revision": revision, "repository": config.repository})
        refspecs = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")
        git("fetch", "--quiet", "--prune", "--force", "origin", *refspecs)
        # neither the branch nor the tag has moved, so this was no conflict and a retry would be refused as well
        if _read_remote_head(git, branch) == before and not git("tag", "--list", version.tag):
            raise GitFailed(
                f"{config.repository}: the push of {version.tag} was refused: {refused}; the files are in the DVC "
                "remote, but git has no version of them. Check the permission to push to this repository"
            )
        raise _PushRejected(refused)

    try:
        return retry_call(
            push_once,
            is_transient=lambda error: isinstance(error, _PushRejected),
            # jitter, so that clients that conflicted do not retry in step
            wait_s=lambda failures: random.uniform(0, 0.2 * failures),
            attempts=config.attempts,
        )
    except _PushRejected as error:
        raise GitFailed(
            f"{config.repository}: another client pushed first {config.attempts} times in a row (version.attempts); "
            f"run the stage again. The last push was refused: {error}"
        ) from None


class _PushRejected(Exception):
    """Another client pushed first; the message is git's."""


def _read_remote_head(git: Git, branch: str) -> str:
    return git("rev-parse", f"refs/remotes/origin/{branch}").strip()


def _commit_and_tag(git: Git, version: DataVersion, pointer: bytes, onto: str) -> None:
    """Make one commit on top of `onto`, and its tag. Git ignores the data files, so the reset leaves them in place."""
    git("reset", "--quiet", "--hard", onto)
    (git.folder / POINTER_FILE).write_bytes(pointer)
    (git.folder / DATA_VERSION_FILE).write_text(version.model_dump_json(indent=1) + "\n", encoding="utf-8")
    ignored = git.folder / ".gitignore"
    lines = ignored.read_text(encoding="utf-8").splitlines() if ignored.is_file() else []
    if f"/{DATA_FOLDER}" not in lines:
        ignored.write_text("\n".join([*lines, f"/{DATA_FOLDER}", ""]), encoding="utf-8")
    git("add", "--", POINTER_FILE, DATA_VERSION_FILE, ".gitignore")
    whose = f"Round {version.round} of {version.line}" if version.line else f"Round {version.round}"
    by = f"run {version.run}\n" if version.run else ""
    message = f"{whose}: {version.pairs} preference pairs\n\nsha256 {version.sha256}\n{by}"
    git("commit", "--quiet", "--no-gpg-sign", "--file=-", stdin=message)
    git("tag", "--annotate", "--no-sign", "--file=-", version.tag, stdin=message)
