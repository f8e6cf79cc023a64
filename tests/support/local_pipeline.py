"""One tiny round as a local pipeline: data and store on a real S3 server, preference data in a bare git repository."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from clincot.runs.layout import ROUND_FILES
from clincot.runs.round_records import read_round_outputs
from clincot.storage.artifacts import upload_folder
from clincot.storage.digests import hash_path
from clincot.storage.open import open_store
from tests.support import tiny
from tests.support.s3_server import S3Server

ROUND = ROUND_FILES | {"checkpoint": "policy"}  # what a round makes: its name in the folder of the round
LIMIT_S = 900


@dataclass(frozen=True)
class World:
    """Where everything lies, and how `clincot` is called on it."""

    folder: Path
    environment: Mapping[str, str]

    def run_local(self, run: str, *more: str, line: str = "tiny") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(run, *more, line=line),
            capture_output=True,
            text=True,
            env=dict(self.environment),
            timeout=LIMIT_S,
        )

    def command(self, run: str, *more: str, line: str = "tiny") -> list[str]:
        addresses = yaml.safe_load((self.folder / "addresses.yaml").read_text(encoding="utf-8"))
        return [
            sys.executable,
            "-m",
            "clincot.cli.app",
            "pipeline",
            "run-local",
            "--run",
            str(self.folder / run),
            "--data",
            addresses["data"],
            "--benchmark",
            addresses["benchmark"],
            "--no-deploy",
            "--policy",
            str(self.folder / "policy"),
            "--params",
            str(self.folder / "params.yaml"),
            "--set",
            f"publish.name={line}",
            *more,
        ]

    def kill_at(self, run: str, task: str, *more: str, line: str = "tiny", after_s: float = 0.0) -> bool:
        """Start a run and kill all of it (SIGKILL) when a task or a stage begins, or a while later.

        False: the run ended before.
        """

        def kill(name: str, group: int) -> bool:
            if name != task:
                return False
            time.sleep(after_s)
            os.killpg(group, signal.SIGKILL)
            return True

        return self.watched(run, kill, *more, line=line)[0] == -signal.SIGKILL

    def watched(self, run: str, act: Callable[[str, int], bool], *more: str, line: str = "tiny") -> tuple[int, str]:
        """Exit code and output of a run. `act` is called with each task that begins (in no fixed order where they do
        not hang on one another) and the run's process group, until it returns True."""
        said, done = [], False
        with subprocess.Popen(
            self.command(run, *more, line=line),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(self.environment),
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            for output in process.stdout:
                said.append(output)
                for task in begun(output):
                    done = done or act(task, process.pid)
        return process.returncode, "".join(said)

    def made(self, number: int = 1, line: str = "tiny") -> dict[str, str]:
        """{what: digest} of what a round made."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            return read_round_outputs(open_store("s3://models/platform"), line, number).digests
        finally:
            os.environ.clear()
            os.environ.update(before)


def build_world(folder: Path, s3: S3Server, repository: str, *, studies: int = 6) -> World:
    """The data sets in the store, models and parameters in the folder."""
    _, *judges = (tiny.write_model(folder / name, seed) for seed, name in enumerate(("policy", "a", "b")))
    sections = tiny.params(judges, evaluate={"arms": ["written", "windows"]}).model_dump(mode="json")
    sections |= {"publish": {"store": "s3://models/platform"}, "version": {"repository": repository}}
    del sections["preflight"]
    (folder / "params.yaml").write_text(yaml.safe_dump(sections))
    tiny.write_set(folder / "data", key=False, studies=studies)
    tiny.write_set(folder / "benchmark", seed=1, studies=8)  # 7 patients are the least that a decision needs
    s3.bucket("models")
    s3.bucket("sets")
    environment = {**os.environ, **s3.environment, "CLINCOT_CACHE": str(folder / "cache")}
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        addresses = {name: upload_folder(folder / name, f"s3://sets/{name}") for name in ("data", "benchmark")}
    finally:
        os.environ.clear()
        os.environ.update(before)
    (folder / "addresses.yaml").write_text(yaml.safe_dump(addresses))
    return World(folder, environment)


def executed(output: str) -> list[str]:
    """The tasks that a run really ran, in their order."""
    return re.findall(r"Executing task \S*?'([a-z0-9-]+)'", output)


def begun(output: str) -> list[str]:
    """The tasks that began, and the stages that began inside the task of a shard."""
    return re.findall(r"(?:Executing task \S*?'|generate, \d+/\d+: )([a-z0-9-]+)", output)


def round_digests(folder: Path) -> dict[str, str]:
    """{what: digest} of a round of `clincot rounds`."""
    return {name: hash_path(folder / file) for name, file in ROUND.items()}
