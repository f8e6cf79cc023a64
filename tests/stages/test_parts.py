"""A stage that is divided among several devices: the same bytes as of one, whatever happens to a part.

The devices are processes on this processor (CLINCOT_DEVICES); on a machine with GPUs each of them has one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from clincot.batching import bound_parts
from clincot.config import JudgeConfig, Params
from clincot.errors import EngineFailed, InvalidInput, PromptTooLong
from clincot.jsonl import InvalidRecord, read_records, write_records
from clincot.models.device_workers import DEVICES_ENV, count_devices, run_on_devices, stop_device_workers
from clincot.models.rollout_engines import free_models
from clincot.records import Candidate, Outcome
from clincot.stages.base import Metrics
from clincot.stages.catalog import STAGES, get_stage
from clincot.stages.judge import share_concurrency
from clincot.stages.runner import run_stage
from tests.support import tiny

STUDIES = 65  # with two questions each: three blocks of 64, and benchmark batches of 128 and 2
ROUND = ("prepare", "propose", "answer", "judge")
FILES = {
    "prepare": ("questions",),
    "propose": ("regions",),
    "answer": ("candidates",),
    "judge": ("judgements", "scores", "panel_report"),
    "evaluate": ("outcomes", "report"),
}


@dataclass(frozen=True)
class Material:
    """What the stages read."""

    data: Path
    benchmark: Path
    policy: Path
    params: Params

    def run(self, stage: str, out: Path, **changed: Path) -> Metrics:
        """Run one stage on the files in `out`."""
        known = {"data": self.data, "benchmark": self.benchmark, "policy": self.policy, **changed}
        inputs = {name: known.get(name, out / f"{name}.jsonl") for name in get_stage(stage).inputs}
        outputs = {name: out / f"{name}.jsonl" for name in FILES[stage]}
        return run_stage(stage, self.params.get_stage_config(stage), inputs, outputs)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As each of two processes on two cores has: sums round by how many threads add them up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    policy, *judges = (tiny.write_model(folder / name, seed) for seed, name in enumerate(("policy", "a", "b")))
    return Material(
        data=tiny.write_set(folder / "data", key=False, studies=STUDIES),
        benchmark=tiny.write_set(folder / "benchmark", seed=1, studies=STUDIES),
        policy=policy,
        params=tiny.params(judges),
    )


@pytest.fixture(scope="module")
def alone(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files, made by one process."""
    out = tmp_path_factory.mktemp("alone")
    for stage in (*ROUND, "evaluate"):
        material.run(stage, out)
    return out


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(DEVICES_ENV, "2")
    monkeypatch.setattr("clincot.models.device_workers.count_cores", lambda: 2)  # one for each
    yield
    stop_device_workers()


def list_workers() -> list[psutil.Process]:
    """The processes that work for a device: multiprocessing has another one of its own."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def copy_files(source: Path, target: Path, *names: str) -> None:
    for name in names:
        (target / f"{name}.jsonl").write_bytes((source / f"{name}.jsonl").read_bytes())


@pytest.mark.slow
def test_two_devices_write_what_one_writes(material: Material, alone: Path, tmp_path: Path, two_devices: None) -> None:
    for stage in (*ROUND, "evaluate"):
        metrics = material.run(stage, tmp_path)
        for name in FILES[stage]:
            assert (tmp_path / f"{name}.jsonl").read_bytes() == (alone / f"{name}.jsonl").read_bytes(), name
        assert metrics == material.run(stage, alone)  # which is up to date, and returns what it returned before
    assert not list(tmp_path.glob(".*.parts"))
    workers = list_workers()
    assert len(workers) == 2
    free_models()  # before training, which needs the memory
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
def test_a_chains_second_step_is_divided_as_well(material: Material, tmp_path: Path, two_devices: None) -> None:
    """Its inputs are also the candidates of the first step, and their scores, which name candidates only."""
    steps = {"steps": ("What is seen?", "{question}")}
    params = material.params.model_copy(update={"answer": material.params.answer.model_copy(update=steps)})
    config = params.get_stage_config("answer")
    for stage in ROUND:
        material.run(stage, tmp_path)
    inputs = {"data": material.data, "policy": material.policy, "questions": tmp_path / "questions.jsonl"}
    inputs |= {"regions": tmp_path / "regions.jsonl"}
    inputs |= {"candidates_before": tmp_path / "candidates.jsonl", "scores_before": tmp_path / "scores.jsonl"}
    get_stage("answer").run(config, inputs, {"candidates": tmp_path / "one.jsonl"})
    run_stage("answer", config, inputs, {"candidates": tmp_path / "two.jsonl"})
    assert {candidate.step for candidate in read_records(tmp_path / "two.jsonl", Candidate)} == {0, 1}
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.slow
def test_an_error_of_a_part_is_the_stages_own(
    material: Material, alone: Path, tmp_path: Path, two_devices: None
) -> None:
    """The last question's last candidate names a region of the first question."""
    copy_files(alone, tmp_path, "questions", "regions", "candidates")
    *before, last = read_records(alone / "candidates.jsonl", Candidate)
    wrong = last.replace_fields(region=before[0].region)
    write_records(tmp_path / "candidates.jsonl", [*before, wrong])
    with pytest.raises(InvalidRecord, match=f"candidates.jsonl: {wrong.id} names {wrong.region}"):
        material.run("judge", tmp_path)
    assert not (tmp_path / "judgements.jsonl").exists()
    assert not list_workers()  # the other part has ended too


@pytest.mark.slow
def test_after_a_lost_process_only_its_part_is_computed_again(
    material: Material, alone: Path, tmp_path: Path, two_devices: None
) -> None:
    """Of 130 questions the first part has 128 and the second 2. The first one's process is killed after the second."""

    def kill_first_worker() -> None:
        while not (finished := list(tmp_path.glob(".outcomes.jsonl.parts/*/1/done.json"))):
            time.sleep(0.01)
        assert not (finished[0].parents[1] / "0" / "done.json").exists()
        min(list_workers(), key=lambda worker: worker.pid).kill()

    killer = threading.Thread(target=kill_first_worker)
    killer.start()
    with pytest.raises(EngineFailed, match="has ended without an error of its own"):
        material.run("evaluate", tmp_path)
    killer.join()
    (kept,) = tmp_path.glob(".outcomes.jsonl.parts/*/1/outcomes.jsonl")
    marked = [outcome.replace_fields(answer="kept") for outcome in read_records(kept, Outcome)]
    write_records(kept, marked)
    material.run("evaluate", tmp_path)
    expected = list(read_records(alone / "outcomes.jsonl", Outcome))
    outcomes = list(read_records(tmp_path / "outcomes.jsonl", Outcome))
    assert sum(outcome.answer == "kept" for outcome in outcomes) == 3 * 2  # arms x questions
    assert [o for o in outcomes if o.answer != "kept"] == [
        o for o in expected if o.question not in {m.question for m in marked}
    ]


def test_each_process_sees_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that the pod sees: a name may be a number, a UUID or a slice of a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, MIG-7f, 5")
    try:
        seen = run_on_devices(os.getenv, [("CUDA_VISIBLE_DEVICES",)] * 2, what="devices", unit="names")
    finally:
        stop_device_workers()
    assert seen == ["3", "MIG-7f"]


@pytest.mark.parametrize(("name", "kind"), [("sent", PromptTooLong), ("told", RuntimeError)])
def test_an_error_of_a_process_is_raised_or_told_by_its_text(name: str, kind: type[Exception]) -> None:
    """Both are built from more than their message, of which pickle knows nothing; users' errors care for it."""
    try:
        with pytest.raises(kind, match="the model's limit is 10 tokens, and the request needs 12"):
            run_on_devices(fail, [(name,)], what="errors", unit="errors")
    finally:
        stop_device_workers()


class UnsendableError(Exception):
    """An error that pickle cannot build again."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"the model's limit is {limit} tokens, and the request needs {tokens}")


def fail(name: str) -> None:
    raise PromptTooLong(8, 4, 10) if name == "sent" else UnsendableError(12, 10)


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5"])
def test_the_number_of_devices_is_a_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICES_ENV, value)
    with pytest.raises(InvalidInput, match=f"CLINCOT_DEVICES={value}: expected a number of devices of at least 1"):
        count_devices()


def test_without_a_gpu_there_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEVICES_ENV, raising=False)
    if not torch.cuda.is_available():
        assert count_devices() == 1


@pytest.mark.parametrize(
    ("blocks", "count", "bounds"),
    [
        (3, 2, [(0, 1), (1, 3)]),
        (8, 4, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (2, 8, [(0, 1), (1, 2)]),
        (1, 4, [(0, 1)]),
        (0, 4, [(0, 0)]),  # the stage says that there are no questions
    ],
)
def test_parts_are_as_equal_as_blocks_can_be(blocks: int, count: int, bounds: list[tuple[int, int]]) -> None:
    assert bound_parts(blocks, count) == bounds


def test_parts_share_the_requests_in_flight() -> None:
    """8 requests in flight are 2 in each of three parts, and never none."""
    judges = [
        {"name": "a", "url": "http://x/v1", "model": "m"},
        {"name": "b", "path": "shipped:judge-a", "concurrency": 1},
    ]
    config = JudgeConfig.model_validate({"judges": judges})
    assert [spec.concurrency for spec in share_concurrency(config, 3).judges] == [2, 1]


def test_stages_that_run_models_are_divided() -> None:
    assert [stage.name for stage in STAGES if stage.parts] == ["propose", "answer", "judge", "evaluate"]
    endpoints = JudgeConfig.model_validate({"judges": [{"name": "a", "url": "http://x/v1", "model": "m"}], "quorum": 1})
    judging = get_stage("judge").parts
    assert judging is not None
    assert not judging.applies(endpoints)  # nothing is computed here
