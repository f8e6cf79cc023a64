"""The pipeline on this machine, as its tasks run in pods: S3, a bare git data repository, a process a task."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from clincot.preferences.versions.init import init_repository
from tests.support.local_pipeline import LIMIT_S, World, build_world, executed, round_digests
from tests.support.s3_server import s3_server

ALWAYS = ["preflight", "start-round", "version", "record-round", "end-round", "record-run-status"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with s3_server(folder / "s3") as s3, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        s3.bucket("preferences")
        repository = str(folder / "preferences.git")
        init_repository(repository, "s3://preferences/rounds")
        yield build_world(folder, s3, repository)


@pytest.fixture(scope="module")
def first(world: World) -> str:
    """The output of an undisturbed run."""
    done = world.run_local("run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def undisturbed(world: World, first: str) -> dict[str, str]:
    """What it made, before other tests run it with other parameters."""
    return world.made()


def test_it_ends_in_the_same_digests_as_the_plain_command_line(
    world: World, first: str, undisturbed: dict[str, str]
) -> None:
    """And in one version of the preference data, since both made the same."""
    command = [
        sys.executable,
        "-m",
        "clincot.cli.app",
        "rounds",
        "--run",
        str(world.folder / "plain"),
        "--no-page",
        "--data",
        str(world.folder / "data"),
        "--benchmark",
        str(world.folder / "benchmark"),
        "--policy",
        str(world.folder / "policy"),
        "--params",
        str(world.folder / "params.yaml"),
        "--set",
        "publish.name=tiny",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(world.environment), timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    plain = round_digests(world.folder / "plain" / "round-01")
    assert {name: digest for name, digest in undisturbed.items() if name in plain} == plain
    tags = subprocess.run(
        ["git", "-C", str(world.folder / "preferences.git"), "tag"], capture_output=True, text=True, check=True
    )
    assert tags.stdout.split() == ["preferences/tiny/round-0001"]
    assert "round 1 of tiny: SUCCEEDED" in first


def test_the_page_names_the_folder_with_all_questions(world: World, first: str) -> None:
    """Kubeflow shows a page without the files beside it: the questions are an artifact of their own."""
    (folder,) = {path.parent for path in world.folder.rglob("round_questions/index.html")}
    rows = (folder / "data" / "rows.js").read_text(encoding="utf-8")
    asked = {json.loads(line)["id"] for line in (world.folder / "data" / "questions.jsonl").read_text().splitlines()}
    assert [name for name in asked if name not in rows] == []
    assert (folder / "data" / "details-00000.js").is_file()
    (page,) = folder.parent.glob("round_page*")
    assert "<code>round_questions</code>" in page.read_text(encoding="utf-8")


def test_the_same_run_twice_does_no_work_twice(world: World, first: str) -> None:
    done = world.run_local("run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert executed(first)[0] == "preflight"
    assert {"generate", "pair", "train", "evaluate-champion", "evaluate-challenger", "decide"} <= {*executed(first)}
    assert executed(done.stdout + done.stderr) == ALWAYS


def test_another_learning_rate_runs_training_and_what_follows_alone(world: World, first: str) -> None:
    done = world.run_local("run", "--set", "train.lr=0.0007")
    assert done.returncode == 0, done.stderr[-3000:]
    assert executed(done.stdout + done.stderr) == [
        "preflight",
        "start-round",
        "version",
        "train",
        "evaluate-challenger",
        "decide",
        "record-round",
        "end-round",
        "page",
        "record-run-status",
    ]


def test_killed_while_it_judges_and_while_it_trains_it_ends_in_the_same_digests(
    world: World, undisturbed: dict[str, str]
) -> None:
    """The task that was killed while it judged goes on with the answers that it has stored."""
    assert world.kill_at("killed", "judge", line="killed", after_s=0.3)
    assert world.kill_at("killed", "train", line="killed", after_s=0.3)
    done = world.run_local("killed", line="killed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "generate" not in executed(done.stdout + done.stderr)
    assert world.made(line="killed") == undisturbed


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--shards", "2"), "12 questions are 1 block(s) of 64, too few for 2 shards"),
        (("--benchmark", "s3://sets/nothing/here"), "benchmark: s3://sets/nothing/here: neither folder.json"),
        (("--benchmark", "s3://no-such-bucket/x"), "no-such-bucket"),
        (("--set", "train.learning_rate=1"), "train.learning_rate"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(more: tuple[str, ...], told: str, world: World, first: str) -> None:
    done = world.run_local("wrong", *more, line="wrong")
    assert done.returncode == 1
    assert told in done.stderr.splitlines()[-1]


def test_a_run_that_fails_before_its_round_began_ends_no_other(world: World, first: str) -> None:
    """Round 1 of the line is open when the second run fails in preflight."""
    assert world.run_local("open", "--shards", "2", line="open").returncode == 1
    done = world.run_local("open", "--benchmark", "s3://sets/nothing/here", line="open")
    assert done.returncode == 1
    assert "open, before a round began: FAILED" in done.stdout + done.stderr
