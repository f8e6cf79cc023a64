"""Divide the work of a stage among the GPUs of its pod, and join what they have written.

A part consists of whole, consecutive blocks of questions (batching.py), so its records are the same bytes as those of
one process; on a processor, those of a process with as many threads as each of several has. A finished part is kept
until the stage is complete, so that an interrupted stage goes on after it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO, Any

from clincot.batching import BLOCK_SIZE, bound_parts
from clincot.jsonl import atomic_write, read_json, read_records, write_json, write_records
from clincot.models.device_workers import run_on_devices
from clincot.records import Candidate, PanelScore, Question, Record, Region
from clincot.stages.base import Metrics, Parts, Paths

_INPUTS_OF_QUESTIONS: dict[str, type[Record]] = {
    "questions": Question,
    "regions": Region,
    "candidates": Candidate,
    "candidates_before": Candidate,
    "scores_before": PanelScore,
}


def run_in_parts(
    name: str, parts: Parts, config: Any, inputs: Paths, outputs: Paths, *, count: int, key: str
) -> Metrics:
    """Run a stage in up to `count` parts at the same time, each in a process with a GPU of its own.

    key: changes with everything that decides the outputs; parts that an interrupted run has finished under it are used.
    """
    first = next(iter(outputs.values()))
    kept = first.with_name(f".{first.name}.parts")
    work = kept / f"{key[:16]}-{count}"
    for other in kept.glob("*"):
        if other != work:
            shutil.rmtree(other)
    given = parts.split(config, inputs, count, work)
    config_of_part = parts.configure(config, len(given))
    written = [_place_outputs(work / str(number), parts.outputs, outputs) for number in range(len(given))]
    calls = [(parts.run, config_of_part, one, out) for one, out in zip(given, written, strict=True)]
    totals: Counter[str] = Counter()
    for metrics in run_on_devices(_run_part, calls, what=name, unit=parts.unit):
        totals.update(metrics)
    joined = parts.join(config, inputs, written, outputs)
    shutil.rmtree(kept)
    return {**totals, **joined}


def _place_outputs(folder: Path, names: Sequence[str], outputs: Paths) -> dict[str, Path]:
    """Where a part writes: files named like the stage's own."""
    return {name: folder / outputs[name].name for name in names}


def _run_part(run: Callable[[Any, Paths, Paths], Metrics], config: Any, inputs: Paths, outputs: Paths) -> Metrics:
    """Compute one part in a worker, unless an earlier run has."""
    done = next(iter(outputs.values())).with_name("done.json")
    if done.is_file():
        finished: Metrics = read_json(done)
        return finished
    metrics = run(config, inputs, outputs)
    write_json(done, metrics)
    return metrics


def split_questions(config: Any, inputs: Paths, count: int, work: Path) -> list[dict[str, Path]]:
    """Divide the questions, and all inputs with records about them. The other inputs are those of every part."""
    questions = [question.id for question in read_records(inputs["questions"], Question)]
    bounds = bound_parts(-(-len(questions) // BLOCK_SIZE), count)
    part_of: dict[str, int] = {}
    for number, (start, end) in enumerate(bounds):
        part_of |= dict.fromkeys(questions[start * BLOCK_SIZE : end * BLOCK_SIZE], number)
    common = {name: path for name, path in inputs.items() if name not in _INPUTS_OF_QUESTIONS}
    parts = [dict(common) for _ in bounds]
    for name, kind in _INPUTS_OF_QUESTIONS.items():  # candidates before the scores, which name them only
        if name in inputs:
            paths = [work / str(number) / f"{name}.jsonl" for number in range(len(bounds))]
            _divide_records(inputs[name], kind, paths, part_of)
            for part, path in zip(parts, paths, strict=True):
                part[name] = path
    return parts


def _divide_records(source: Path, kind: type[Record], targets: Sequence[Path], part_of: dict[str, int]) -> None:
    """Write every record to its question's part.

    A record of something unknown stays behind the one before it, where the stage refuses it.
    """
    with ExitStack() as stack:
        files: list[IO[str]] = [stack.enter_context(atomic_write(path)) for path in targets]
        number = 0
        for record in read_records(source, kind):
            number = part_of.get(_get_question(record), number)
            if isinstance(record, Candidate):
                part_of[record.id] = number
            files[number].write(record.model_dump_json() + "\n")


def _get_question(record: Record) -> str:
    """What part_of knows a record by: its question, or the candidate of a score."""
    if isinstance(record, Question):
        return record.id
    if isinstance(record, PanelScore):
        return record.candidate
    return record.question if isinstance(record, Region | Candidate) else ""


def join_records(kind: type[Record], name: str) -> Callable[[Any, Paths, Sequence[Paths], Paths], Metrics]:
    """A join that writes the parts' records of one output one after the other."""

    def join(config: Any, inputs: Paths, written: Sequence[Paths], outputs: Paths) -> Metrics:
        records = chain.from_iterable(read_records(part[name], kind) for part in written)
        return {name: write_records(outputs[name], records)}

    return join
