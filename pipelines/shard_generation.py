"""Generates and scores the candidates of one shard: propose, then answer and judge for each step of the chain.

The stages are those of the command line and write the same bytes. They run in one task, because each task of Kubeflow
Pipelines costs some 40 kB of the Workflow object (workflow_size.py), and a shard's policy is downloaded once.

Where all judges are endpoints, a second task judges the answers, without an accelerator (generation_tasks.py).

After each stage the files of the shard are stored, so that a task whose pod was lost goes on after the last finished
stage:

    <store>/questions/<sha256>.jsonl      questions of a round
    <store>/versions/<sha256>.jsonl       record of the version of the preference data
    <store>/shards/<sha256>/…            files of a shard, under the hash of their content
    <store>/shards/groups/<sha256>.json   which shards a task has finished
    <store>/shards/unfinished/<key>.json  where the files of an unfinished shard are; key: everything they depend on

The next task gets the digest of the list of a task's shards, so an argument holds the results of any number of shards.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clincot.jsonl import hash_files
from clincot.runs.layout import ROUND_FILES
from clincot.storage.artifacts import (
    MANIFEST_NAMES,
    download_files,
    download_folder,
    read_content,
    store_content,
    upload_folder,
)
from clincot.storage.store import KeyExists, KeyNotFound, Store, VersionConflict

SHARDS_FOLDER = "shards"
QUESTIONS_FOLDER = "questions"
VERSIONS_FOLDER = "versions"
UNFINISHED_FOLDER = f"{SHARDS_FOLDER}/unfinished"
GROUPS_FOLDER = f"{SHARDS_FOLDER}/groups"
# Files of a shard that are merged. The scores are computed from the judgements of all shards.
ANSWER_FILES = ("regions", "candidates")
SHARD_FILES = (*ANSWER_FILES, "judgements", "panel_report")

# Runs a stage: name, input paths or addresses by name, output paths by name.
StageRunner = Callable[[str, Mapping[str, str], Mapping[str, str]], object]


@dataclass(frozen=True)
class ShardInputs:
    """What the stages of a shard read: paths or addresses. key: changes with everything that decides the result."""

    shard: str  # its name, such as 2/8
    data: str
    questions: str  # of this shard
    policy: str
    steps: int  # of the chain
    key: str


def generate_shard(inputs: ShardInputs, store: Store, run: StageRunner, *, judges: bool = True) -> str:
    """Run the stages of a shard, or those that an interrupted task left; return the sha256 of the shard's files.

    They are stored as the folder `<store>/shards/<sha256>`. Without `judges`, a shard of a chain with one step ends
    with its answers, which judge_shard goes on from; a longer chain needs the scores of each step for the next one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) / "work"
        _restore_progress(store, inputs.key, work)

        def run_and_keep(stage: str, read: Mapping[str, str], written: Mapping[str, str]) -> None:
            print(f"generate, {inputs.shard}: {stage}", flush=True)
            run(stage, read, written)
            _keep_progress(store, inputs.key, work)

        regions = {"regions": str(work / ROUND_FILES["regions"])}
        read = {"data": inputs.data, "questions": inputs.questions}
        run_and_keep("propose", {**read, "policy": inputs.policy}, regions)
        if judges or inputs.steps > 1:
            _answer_and_judge(inputs, {**read, **regions}, work, run_and_keep)
            digest = _store_shard(work, SHARD_FILES, store)
        else:
            candidates = {"candidates": str(work / ROUND_FILES["candidates"])}
            run_and_keep("answer", {**read, **regions, "policy": inputs.policy}, candidates)
            digest = _store_shard(work, ANSWER_FILES, store)
    store.delete(_progress_key(inputs.key))
    return digest


def judge_shard(inputs: ShardInputs, store: Store, run: StageRunner, *, answered: str) -> str:
    """Judge the answers of a shard, which generate_shard has stored; return the sha256 of the shard's files.

    answered: what generate_shard returned. A shard that is judged already stays as it is.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) / "work"
        folder = download_folder(f"{store.url}/{SHARDS_FOLDER}/{answered}")
        shutil.copytree(folder, work, ignore=shutil.ignore_patterns(*MANIFEST_NAMES))
        if (work / ROUND_FILES["judgements"]).is_file():
            return answered
        print(f"judge, {inputs.shard}", flush=True)
        read = {name: str(work / ROUND_FILES[name]) for name in ANSWER_FILES}
        written = {name: str(work / ROUND_FILES[name]) for name in ("judgements", "scores", "panel_report")}
        run("judge", {"data": inputs.data, "questions": inputs.questions, **read}, written)
        return _store_shard(work, SHARD_FILES, store)


def read_group_manifest(store: Store, group: str) -> list[str]:
    """The digests of the shards in a list that write_group_manifest has stored. Raises ChecksumMismatch."""
    content = read_content(store, GROUPS_FOLDER, group, what="the list of shards")
    digests: list[str] = json.loads(content)["shards"]
    return digests


def write_group_manifest(store: Store, digests: Sequence[str]) -> str:
    """Store which shards a task has finished; return the sha256 of the list, which is all that the next task gets."""
    return store_content(store, GROUPS_FOLDER, json.dumps({"shards": list(digests)}).encode())


def download_shards(store: Store, groups: Sequence[str]) -> dict[str, list[Path]]:
    """Download finished shards; return the paths of their files, {name of SHARD_FILES: path in each shard}.

    groups: what `write_group_manifest` returned for each task, in the order of the shards. Raises ChecksumMismatch.
    """
    folders = []
    for group in groups:
        digests = read_group_manifest(store, group)
        folders += [download_folder(f"{store.url}/{SHARDS_FOLDER}/{digest}") for digest in digests]
    files = {}
    for name in SHARD_FILES:
        files[name] = [folder / ROUND_FILES[name] for folder in folders]
    return files


def store_file(store: Store, folder: str, path: Path) -> str:
    """Store a file (JSON Lines) below a folder of the store under its sha256, and return that."""
    digest = hash_files(path)
    with suppress(KeyExists):
        store.upload(f"{folder}/{digest}.jsonl", path)
    return digest


def fetch_file(store: Store, folder: str, digest: str, target: Path) -> Path:
    """Download a stored file into the folder `target` and verify it. Raises ChecksumMismatch, KeyNotFound."""
    name = f"{digest}.jsonl"
    download_files(store, {name: digest}, target, prefix=f"{folder}/")
    return target / name


def _answer_and_judge(inputs: ShardInputs, read: Mapping[str, str], work: Path, run: StageRunner) -> None:
    """Run answer and judge for each step of the chain. A later step reads the candidates and scores of the earlier."""
    before: dict[str, str] = {}
    for step in range(1, inputs.steps + 1):
        stem = "" if step == inputs.steps else f"step-{step}."
        written = {
            name: str(work / f"{stem}{ROUND_FILES[name]}")
            for name in ("candidates", "judgements", "scores", "panel_report")
        }
        candidates = {"candidates": written.pop("candidates")}
        run("answer", {**read, "policy": inputs.policy, **before}, candidates)
        run("judge", {**read, **candidates}, written)
        before = {"candidates_before": candidates["candidates"], "scores_before": written["scores"]}


def _store_shard(work: Path, names: Sequence[str], store: Store) -> str:
    """Store files of the work folder as those of the shard; return the sha256 of the folder."""
    with tempfile.TemporaryDirectory() as temporary:
        finished = Path(temporary) / "finished"
        finished.mkdir()
        for name in names:
            shutil.copyfile(work / ROUND_FILES[name], finished / ROUND_FILES[name])
        return upload_folder(finished, f"{store.url}/{SHARDS_FOLDER}").rpartition("/")[2]


def _progress_key(key: str) -> str:
    return f"{UNFINISHED_FOLDER}/{key}.json"


def _restore_progress(store: Store, key: str, work: Path) -> None:
    """Copy the files that an interrupted task has stored into the work folder."""
    try:
        address = json.loads(store.read(_progress_key(key)).content)["files"]
    except KeyNotFound:
        work.mkdir()
        return
    print(f"resuming from the files of an earlier attempt: {address}", flush=True)
    shutil.copytree(download_folder(address), work, ignore=shutil.ignore_patterns(*MANIFEST_NAMES))


def _keep_progress(store: Store, key: str, work: Path) -> None:
    """Store the files of the work folder, and where they are. Of two pods with one shard, either's files serve."""
    address = upload_folder(work, f"{store.url}/{SHARDS_FOLDER}")
    content = json.dumps({"files": address}).encode()
    with suppress(KeyExists, VersionConflict):
        try:
            tag = store.read(_progress_key(key)).tag
        except KeyNotFound:
            store.write_new(_progress_key(key), content)
        else:
            store.replace(_progress_key(key), content, tag)
