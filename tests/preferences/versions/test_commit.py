"""A round's preference data in a real git repository and a real S3: what another finds there, what others change."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clincot.jsonl import InvalidRecord, hash_files
from clincot.preferences.versions import commit as keeping
from clincot.preferences.versions.commit import RoundAlreadyVersioned
from clincot.preferences.versions.describe import FILE_NAMES
from clincot.preferences.versions.tags import DataOrigin
from clincot.records import DataVersion
from tests.preferences.versions.conftest import BUCKET, git, key_of, make_round, references

pytestmark = pytest.mark.slow
COMMITTER = {"GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@localhost"}


def test_a_clone_gets_the_same_bytes_and_reruns_change_nothing(repository: Path, objects: Any, tmp_path: Path) -> None:
    """3 questions with 2 pairs each; 8 files and their listing are 9 objects."""
    made = make_round(tmp_path / "round")
    assert made.keep(repository) == {"versioned": 1.0, "pairs": 6, "files": 8, "bytes": made.kept.size}
    kept = made.kept
    assert (kept.tag, kept.round, kept.repository) == ("preferences/round-0001", 1, str(repository))
    assert (
        git(repository, "rev-parse", f"{kept.tag}^{{commit}}") == git(repository, "rev-parse", "main") == kept.revision
    )
    for file in kept.files:
        assert objects.head_object(Bucket=BUCKET, Key=key_of(file.md5))["ContentLength"] == file.size

    git(tmp_path, "clone", "--quiet", "--branch", kept.tag, str(repository), "another")
    subprocess.run([sys.executable, "-m", "dvc", "pull"], cwd=tmp_path / "another", check=True, capture_output=True)
    for name, path in made.at.items():
        assert (tmp_path / "another" / "preferences" / FILE_NAMES[name]).read_bytes() == path.read_bytes(), name

    before = (
        references(repository),
        made.output.read_bytes(),
        made.output.with_name("version.json.stage.json").read_bytes(),
    )
    made.keep(repository)
    made.keep(repository, round=1)
    assert before[:2] == (references(repository), made.output.read_bytes())
    assert sorted(p.name for p in made.output.parent.glob("*.clone*")) == []

    gone = kept.files[0]
    objects.delete_object(Bucket=BUCKET, Key=key_of(gone.md5))
    made.keep(repository)  # what is lost in the remote is sent again
    assert objects.head_object(Bucket=BUCKET, Key=key_of(gone.md5))["ContentLength"] == gone.size
    assert before[:2] == (references(repository), made.output.read_bytes())


def test_without_a_repository_the_record_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_round(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert made.keep("")["versioned"] == 0.0
    assert "the preference data is not versioned: no data repository is named (version.repository)" in caplog.text
    kept = made.kept
    assert (kept.revision, kept.tag, kept.repository) == ("", "", "")
    assert kept.unversioned.startswith("no data repository is named")
    assert (kept.pairs, kept.questions, kept.candidates) == (6, 3, 12)
    assert {file.name: file.sha256 for file in kept.files} == {FILE_NAMES[n]: hash_files(p) for n, p in made.at.items()}


def test_a_version_is_what_it_is_wherever_it_is_kept(tmp_path: Path) -> None:
    made = make_round(tmp_path)
    made.keep("")
    here = made.kept
    moved = {"repository": "/a", "revision": "f" * 40, "tag": "preferences/round-0007", "round": 7, "unversioned": ""}
    assert DataVersion.model_validate({**here.model_dump(), **moved}).id == here.id
    other = make_round(tmp_path / "other", seed=1)
    other.keep("")
    assert other.kept.id != here.id


def test_lines_and_runs_do_not_share_a_counter(repository: Path, tmp_path: Path) -> None:
    """Round 1 of two lines, after a version without a line. Each has a number 1, and says which run made it."""
    make_round(tmp_path / "old", seed=60).keep(repository)  # as a release before there were lines
    for seed, line in ((61, "nodules"), (62, "effusions")):
        made = make_round(tmp_path / line, seed=seed)
        made.keep(repository, origin=DataOrigin(line=line, round=1, run=f"night-{seed}"))
        assert (made.kept.tag, made.kept.round) == (f"preferences/{line}/round-0001", 1)
        assert (made.kept.line, made.kept.run) == (line, f"night-{seed}")
    tags = git(repository, "tag").splitlines()
    assert tags == ["preferences/effusions/round-0001", "preferences/nodules/round-0001", "preferences/round-0001"]
    message = git(repository, "log", "-1", "--format=%B", "preferences/nodules/round-0001")
    assert message.splitlines()[0] == "Round 1 of nodules: 6 preference pairs"
    assert message.splitlines()[-1] == "run night-61"


def test_a_round_that_was_begun_again_has_a_second_version(repository: Path, tmp_path: Path) -> None:
    """A later run of the round with the same data finds the version that is there, of the run that made it."""
    first, second = make_round(tmp_path / "a", seed=63), make_round(tmp_path / "b", seed=64)
    first.keep(repository, origin=DataOrigin(line="nodules", round=3, run="one"))
    record = first.output.read_bytes()
    first.keep(repository, origin=DataOrigin(line="nodules", round=3, run="two"))
    assert first.output.read_bytes() == record
    second.keep(repository, origin=DataOrigin(line="nodules", round=3, run="three"))
    assert [first.kept.tag, second.kept.tag] == ["preferences/nodules/round-0003", "preferences/nodules/round-0003-2"]
    assert second.kept.round == 3
    made = make_round(tmp_path / "c", seed=65)
    made.keep(repository, origin=DataOrigin(line="nodules", run="by-hand"))
    assert made.kept.tag == "preferences/nodules/round-0004"  # no round is known: the next of the line


def test_a_tag_that_was_moved_is_told_with_its_repair(repository: Path, tmp_path: Path) -> None:
    """The commands in the message put the tag back; they are run here as they stand there."""
    rounds = [make_round(tmp_path / f"{number}", seed=66 + number) for number in (1, 2)]
    for number, made in enumerate(rounds, start=1):
        made.keep(repository, origin=DataOrigin(line="nodules", round=number))
    name, clone = "preferences/nodules/round-0001", tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(repository), "clone")
    git(clone, "tag", "--force", name, "main")
    git(clone, "push", "--quiet", "--force", "origin", f"refs/tags/{name}")
    with pytest.raises(InvalidRecord, match=f"the tag {name} holds the version of .*round-0002, so it was") as refused:
        rounds[1].keep(repository)
    commands = str(refused.value).partition("put it back: ")[2]
    assert rounds[0].kept.revision in commands
    subprocess.run(commands, shell=True, cwd=clone, check=True, capture_output=True, env={**os.environ, **COMMITTER})
    rounds[1].keep(repository, origin=DataOrigin(line="nodules", round=2))
    git(clone, "tag", "preferences/nodules/round-0009", "HEAD~2")
    git(clone, "push", "--quiet", "origin", "preferences/nodules/round-0009")
    with pytest.raises(InvalidRecord, match="remove it: git push --delete origin preferences/nodules/round-0009"):
        rounds[1].keep(repository)


def test_two_that_push_at_once_both_get_their_version(repository: Path, tmp_path: Path) -> None:
    """Two processes from the same commit: the one that comes second is put on top of the first."""
    rounds = [make_round(tmp_path / name, seed=seed) for seed, name in enumerate("ab", start=10)]

    def run(number: int) -> subprocess.CompletedProcess[str]:
        paths = {**rounds[number].at, "version": rounds[number].output}
        options = [part for name, path in paths.items() for part in (f"--{name.replace('_', '-')}", str(path))]
        command = [sys.executable, "-m", "clincot.cli.app", "version", *options, "--repository", str(repository)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, range(2)):
            assert done.returncode == 0, done.stderr
    first, second = sorted((made.kept for made in rounds), key=lambda version: version.round)
    assert [first.tag, second.tag] == ["preferences/round-0001", "preferences/round-0002"]
    assert git(repository, "rev-parse", f"{second.revision}^") == first.revision
    assert git(repository, "rev-parse", "main") == second.revision
    for version in (first, second):
        held = json.loads(git(repository, "show", f"{version.tag}:preferences.json"))
        assert held["sha256"] == version.sha256


def test_what_others_pushed_in_the_meantime_stays(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the files are on their way to the remote somebody changes the README and pushes it."""
    made = make_round(tmp_path / "round", seed=20)
    into_remote = keeping._push_files

    def meanwhile(*given: Any) -> None:
        into_remote(*given)
        git(tmp_path, "clone", "--quiet", str(repository), "theirs")
        (tmp_path / "theirs" / "README.md").write_text("changed by hand\n")
        git(tmp_path / "theirs", "commit", "--quiet", "--all", "--message=By hand")
        git(tmp_path / "theirs", "push", "--quiet")

    monkeypatch.setattr(keeping, "_push_files", meanwhile)
    made.keep(repository)
    assert git(repository, "show", "main:README.md") == "changed by hand"
    assert git(repository, "log", "--format=%s", "main").splitlines()[:2] == ["Round 1: 6 preference pairs", "By hand"]


def test_a_round_that_holds_other_data_is_not_written_over(repository: Path, tmp_path: Path) -> None:
    """By hand, without DVC: what stands in git decides."""
    git(tmp_path, "clone", "--quiet", str(repository), "theirs")
    theirs = make_round(tmp_path / "other", seed=30)
    theirs.keep("")
    held = theirs.kept.model_copy(update={"unversioned": "", "round": 4, "tag": "preferences/round-0004"})
    (tmp_path / "theirs" / "preferences.json").write_text(held.model_dump_json())
    git(tmp_path / "theirs", "add", "--all")
    git(tmp_path / "theirs", "commit", "--quiet", "--message=Round 4")
    git(tmp_path / "theirs", "tag", held.tag)
    git(tmp_path / "theirs", "push", "--quiet", "origin", "main", held.tag)
    before = references(repository)
    with pytest.raises(
        RoundAlreadyVersioned, match=r"round-0004 holds other preference data \(6 pairs, .*of test@localhost, 20"
    ):
        make_round(tmp_path / "mine", seed=31).keep(repository, round=4)
    git(tmp_path / "theirs", "tag", "preferences/round-0005", "HEAD^")
    git(tmp_path / "theirs", "push", "--quiet", "origin", "preferences/round-0005")
    with pytest.raises(InvalidRecord, match=r"the tag preferences/round-0005 holds no preferences\.json"):
        make_round(tmp_path / "mine", seed=31).keep(repository)
    assert references(repository).replace("refs/tags/preferences/round-0005", "").startswith(before.splitlines()[0])


def test_files_that_do_not_belong_together_are_no_version(tmp_path: Path) -> None:
    made = make_round(tmp_path)
    lines = made.at["pairs"].read_text().splitlines(keepends=True)
    made.at["pairs"].write_text("".join(lines[:-1]))
    with pytest.raises(InvalidRecord, match=r"pairs\.jsonl: holds 5 pairs, but .*pair_report\.json reports 6"):
        made.keep("")
    assert not made.output.exists()
    made.at["pairs"].write_text("".join(lines)[:-10])
    with pytest.raises(InvalidRecord, match=r"pairs\.jsonl:6: the file ends in the middle of a line"):
        made.keep("")
