"""One tiny round as a local pipeline, recorded: the command of every task, and what the store held before it ran.

As a program (`python -m tests.support.recorded_round REAL FOLDER ARGUMENTS…`) it stands for the Python that runs a
task. Two tasks are not run as they are. Six images prove nothing, so the verdict of `decide` becomes "promote".
`deploy` is only noted, because the tests roll out to a cluster.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.session import get_session

BUCKETS = ("models", "preferences")
VERDICTS = ("promote", "keep", "blocked")


@dataclass(frozen=True)
class RecordedTask:
    """A task: its name, what follows `python -m`, and the files of the store before it (bucket/key: sha256)."""

    name: str
    argv: tuple[str, ...]
    stored: Mapping[str, str]
    repository: str  # a copy of the data repository before the task

    @property
    def executor_input(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.argv[self.argv.index("--executor_input") + 1])
        return parsed

    @property
    def outputs(self) -> str:
        """The folder below which the task writes."""
        return str(Path(self.executor_input["outputs"]["outputFile"]).parent)

    def moved_to(self, folder: Path, values: Mapping[str, Any] | None = None) -> list[str]:
        """The command with other outputs, and other values of parameters ({old value: new value}, wherever it is)."""
        text = self.argv[self.argv.index("--executor_input") + 1]
        content = json.loads(text.replace(self.outputs, str(folder)))
        inputs = content["inputs"]
        inputs["parameterValues"] = _replace_values(inputs.get("parameterValues", {}), dict(values or {}))
        return [json.dumps(content) if word == text else word for word in self.argv]


def _replace_values(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        return {name: _replace_values(one, values) for name, one in value.items()}
    return values.get(value, value) if isinstance(value, str) else value


def read_tasks(folder: Path) -> list[RecordedTask]:
    """The tasks of a recorded round in the order in which they began."""
    lines = (folder / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
    return [RecordedTask(**json.loads(line)) for line in lines]


def connect() -> Any:
    """A client of the store itself, without a gate."""
    return get_session().create_client("s3", endpoint_url=os.environ["CLINCOT_TEST_STORE"], region_name="us-east-1")


def list_objects(client: Any) -> dict[str, str]:
    """{bucket/key: ETag} of everything that is stored."""
    found = {}
    for bucket in BUCKETS:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            found |= {f"{bucket}/{item['Key']}": item["ETag"].strip('"') for item in page.get("Contents", ())}
    return found


def save_state(client: Any, blobs: Path) -> dict[str, str]:
    """Save the content of every object once; return {bucket/key: ETag}."""
    found = list_objects(client)
    for name, tag in found.items():
        if not (blobs / tag).exists():
            bucket, _, key = name.partition("/")
            (blobs / tag).write_bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    return found


def restore_state(client: Any, blobs: Path, wanted: Mapping[str, str]) -> None:
    """Make the store hold what it held."""
    found = list_objects(client)
    for name in found.keys() - wanted.keys():
        bucket, _, key = name.partition("/")
        client.delete_object(Bucket=bucket, Key=key)
    for name, tag in wanted.items():
        if found.get(name) != tag:
            bucket, _, key = name.partition("/")
            client.put_object(Bucket=bucket, Key=key, Body=(blobs / tag).read_bytes())


def hash_outputs(folder: Path) -> dict[str, str]:
    """{file: sha256} of what a task wrote, without the file in which kfp notes where the others are."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "executor_output.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    real, folder, *arguments = sys.argv[1:]
    recording = Path(folder)
    name = arguments[arguments.index("--function_to_execute") + 1]
    number = len(list(recording.glob("repository-*")))
    repository = recording / f"repository-{number}"
    shutil.copytree(os.environ["CLINCOT_TEST_REPOSITORY"], repository)
    task = RecordedTask(
        name=name,
        argv=tuple(arguments[1:]),
        stored=save_state(connect(), recording / "blobs"),
        repository=str(repository),
    )
    with (recording / "tasks.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(vars(task)) + "\n")
    outputs = task.executor_input["outputs"]
    if name == "deploy":
        _write(outputs["outputFile"], json.dumps({"parameterValues": {"Output": "noted"}}))
        return 0
    code = subprocess.run([real, *arguments], check=False).returncode
    if name == "decide" and code == 0:
        _promote(outputs)
    return code


def _promote(outputs: dict[str, Any]) -> None:
    """Turn the verdict of `decide` into a promotion, in its output and in the decision that later tasks read."""
    from clincot.jsonl import read_records, write_records
    from clincot.records import Decision
    from clincot.runs.layout import DECISION_FILE

    path = Path(outputs["artifacts"]["round_files"]["artifacts"][0]["uri"]) / DECISION_FILE
    (decision,) = read_records(path, Decision)
    content = {**decision.model_dump(exclude={"id"}), "verdict": "promote", "reasons": ("for the test",)}
    write_records(path, [Decision.model_validate(content)])
    written = Path(outputs["outputFile"])
    result = json.loads(written.read_text(encoding="utf-8"))
    values = {name: "promote" if value in VERDICTS else value for name, value in result["parameterValues"].items()}
    written.write_text(json.dumps({**result, "parameterValues": values}), encoding="utf-8")


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def recording_python(folder: Path) -> Iterator[Path]:
    """In place of fork_server.preloaded_python: the same, and every task is recorded in `folder`."""
    from clincot.pipelines.fork_server import preloaded_python

    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    with preloaded_python() as real:
        script = folder / "python3"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.support.recorded_round {real} {folder} "$@"\n')
        script.chmod(0o755)
        yield script


def record(folder: Path, arguments: list[str]) -> int:
    """Run a command line of clincot whose pipeline is recorded."""
    from clincot.cli import main as run
    from clincot.pipelines import run_local

    run_local.preloaded_python = lambda: recording_python(folder)  # type: ignore[assignment]
    return run(arguments)


if __name__ == "__main__":
    raise SystemExit(record(Path(sys.argv[2]), sys.argv[3:]) if sys.argv[1] == "record" else main())
