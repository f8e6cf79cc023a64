"""What fails between the files and git: nothing is committed, the error says what and where, doing it again helps."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from clincot.errors import InvalidInput
from clincot.preferences.versions import commit as keeping
from clincot.preferences.versions.dvc import DvcFailed
from clincot.preferences.versions.git import GitFailed
from clincot.preferences.versions.init import init_repository
from clincot.stages.catalog import get_stage
from tests.preferences.versions.conftest import BUCKET, Round, git, hook, key_of, make_round, references
from tests.support.s3_server import SECRET, s3_server

pytestmark = pytest.mark.slow


def other_remote(repository: Path, folder: Path, url: str) -> None:
    """Let the repository's files go elsewhere."""
    git(folder, "clone", "--quiet", str(repository), "changing")
    config = folder / "changing" / ".dvc" / "config"
    config.write_text(config.read_text().replace(f"s3://{BUCKET}/rounds", url))
    git(folder / "changing", "commit", "--quiet", "--all", "--message=Elsewhere")
    git(folder / "changing", "push", "--quiet")


def nothing_came_of_it(made: Round, repository: Path, before: str) -> None:
    assert references(repository) == before
    assert not made.output.exists()
    assert list(made.output.parent.glob("version.json*")) == []


def test_a_wrong_secret_and_a_missing_bucket_are_told(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, before = make_round(tmp_path / "round", seed=40), references(repository)
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong-" + SECRET)
        with pytest.raises(DvcFailed, match=r"dvc push failed: Forbidden: .*check the AWS_… variables") as refused:
            made.keep(repository)
    assert SECRET not in str(refused.value)
    nothing_came_of_it(made, repository, before)
    other_remote(repository, tmp_path, "s3://no-such-bucket/rounds")
    before = references(repository)
    with pytest.raises(DvcFailed, match=r"The specified bucket does not exist.*remote in the data repository's"):
        made.keep(repository)
    nothing_came_of_it(made, repository, before)


def test_a_push_is_verified_after_it_reports_success(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of its own, stopped between `dvc push` and the look for the objects; the next run finds one up."""
    made = make_round(tmp_path / "round", seed=41)
    with ExitStack() as stack, monkeypatch.context() as stopped:
        server = stack.enter_context(s3_server(tmp_path / "s3"))
        server.bucket(BUCKET)
        stopped.setenv("AWS_ENDPOINT_URL_S3", server.url)
        stopped.setenv("AWS_MAX_ATTEMPTS", "1")
        before, dvc = references(repository), keeping.run_dvc

        def stopping(folder: Path, *arguments: str, timeout_s: float) -> str:
            said = dvc(folder, *arguments, timeout_s=timeout_s)
            if arguments[0] == "push":
                stack.close()
            return said

        stopped.setattr(keeping, "run_dvc", stopping)
        with pytest.raises(DvcFailed, match=r"the DVC remote cannot be accessed: .*[Cc]onnect"):
            made.keep(repository)
    nothing_came_of_it(made, repository, before)
    made.keep(repository)
    assert references(repository).endswith(
        f"refs/heads/main {made.kept.revision}\nrefs/tags/{made.kept.tag} {git(repository, 'rev-parse', made.kept.tag)}"
    )


def test_an_object_that_did_not_land_is_named(
    repository: Path, objects: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remote loses the scores again and again, as one would with a rule that deletes what is new."""
    made, before, missing = (
        make_round(tmp_path / "round", seed=42),
        references(repository),
        keeping.find_missing_objects,
    )

    def losing(folder: Path, wanted: Any) -> list[str]:
        objects.delete_object(Bucket=BUCKET, Key=key_of(lost))
        return missing(folder, wanted)

    made.keep("")
    lost = next(file.md5 for file in made.kept.files if file.name == "scores.jsonl")
    for left in made.output.parent.glob("version.json*"):
        left.unlink()
    monkeypatch.setattr(keeping, "find_missing_objects", losing)
    with pytest.raises(DvcFailed, match=rf"pushed, but not in the DVC remote: scores\.jsonl \({lost}\); nothing was"):
        made.keep(repository)
    nothing_came_of_it(made, repository, before)
    monkeypatch.undo()


def test_a_refused_push_leaves_no_version_and_no_tag(repository: Path, tmp_path: Path) -> None:
    hook(repository, "echo 'only the release team may push' >&2; exit 1")
    made, before = make_round(tmp_path / "round", seed=43), references(repository)
    with pytest.raises(
        GitFailed, match=r"push of preferences/round-0001 was refused: .*only the release team may push"
    ):
        made.keep(repository)
    nothing_came_of_it(made, repository, before)
    (repository / "hooks" / "pre-receive").unlink()
    made.keep(repository)
    assert made.kept.tag == "preferences/round-0001"


# Killed (SIGKILL) just before the process starts a command whose arguments hold all of these words.
KILLED_AT = [("dvc", "push"), ("git", "push")]
KILLER = """
import os, signal, sys
def kill(event, details):
    if event == "subprocess.Popen" and set({words!r}) <= {{os.path.basename(str(one)) for one in details[1]}}:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
from clincot.cli import main
sys.exit(main({arguments!r}))
"""


def test_killed_at_any_moment_it_comes_to_the_same_end(repository: Path, tmp_path: Path) -> None:
    made, before = make_round(tmp_path / "round", seed=44), references(repository)
    stage = get_stage("version")
    options = [part for name in stage.inputs for part in (f"--{name.replace('_', '-')}", str(made.at[name]))]
    arguments = ["version", *options, "--version", str(made.output), "--repository", str(repository)]
    for words in KILLED_AT:
        code = KILLER.format(words=words, arguments=arguments)
        killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert killed.returncode == -9, (words, killed.stderr)
        assert references(repository) == before
        assert not made.output.exists()
    made.keep(repository)
    assert made.kept.tag == "preferences/round-0001"
    assert git(repository, "log", "--format=%s", "main").splitlines()[0] == "Round 1: 6 preference pairs"
    assert list(made.output.parent.glob("*.clone")) == []


def test_what_is_no_data_repository_is_told(tmp_path: Path) -> None:
    made = make_round(tmp_path / "round", seed=45)
    with pytest.raises(GitFailed, match=r"nowhere\.git: could not be cloned: .*does not exist"):
        made.keep(tmp_path / "nowhere.git")
    git(tmp_path, "init", "--quiet", "--bare", "plain.git")
    with pytest.raises(InvalidInput, match=r"plain\.git: is not a data repository .*`clincot data init` makes one"):
        made.keep(tmp_path / "plain.git")
    with pytest.raises(GitFailed, match=r"could not be cloned: .*[Bb]ranch releases not found"):
        made.keep(tmp_path / "plain.git", branch="releases")


def test_a_tag_is_no_branch(repository: Path, tmp_path: Path) -> None:
    git(repository, "tag", "v1", "main")
    with pytest.raises(InvalidInput, match=r"version\.branch must name a branch, and 'v1' is a tag"):
        make_round(tmp_path / "round", seed=47).keep(repository, branch="v1")


def test_addresses_with_secrets_are_refused_without_showing_them(tmp_path: Path) -> None:
    made = make_round(tmp_path / "round", seed=46)
    for address in ("https://ann:hunter2@host/data.git", "https://hunter2@host/data.git"):
        with pytest.raises(InvalidInput, match="CLINCOT_GIT_TOKEN") as refused:
            made.keep(address)
        assert "hunter2" not in str(refused.value)
    with pytest.raises(InvalidInput, match="AWS_… variables") as refused:
        init_repository(str(tmp_path / "new.git"), "s3://key:hunter2@bucket/x")
    assert "hunter2" not in str(refused.value)
    assert not (tmp_path / "new.git").exists()


def test_a_repository_is_started_once(repository: Path) -> None:
    before = references(repository)
    init_repository(str(repository), f"s3://{BUCKET}/rounds")
    assert references(repository) == before
    with pytest.raises(InvalidInput, match=f"is a data repository already, whose files go to s3://{BUCKET}/rounds"):
        init_repository(str(repository), "s3://elsewhere/rounds")
