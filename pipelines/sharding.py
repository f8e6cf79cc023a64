"""A round's questions in shards that are worked on apart, and what they made put together again.

A shard is a run of whole units (units.py), so a question's regions, answers and scores are the same bytes in whichever
shard it falls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from clincot.batching import BLOCK_SIZE
from clincot.config import JudgeConfig
from clincot.errors import InvalidInput
from clincot.jsonl import read_json_model, read_records, write_json, write_records
from clincot.judging.combination import PanelReport
from clincot.judging.panel import combine_panel
from clincot.records import Candidate, Judgement, Question, Region

Metrics = dict[str, float]


def list_shard_names(questions: Path, shards: int) -> list[str]:
    """ "1/3", "2/3", "3/3". Raises BadInput where a shard would be empty."""
    count = sum(1 for _ in read_records(questions, Question))
    units = -(-count // BLOCK_SIZE)
    if shards > units:
        raise InvalidInput(
            f"{questions}: {count} questions are {units} units of {BLOCK_SIZE}, too few for {shards} shards: "
            f"{shards - units} would be empty; ask for at most {units} (--shards)"
        )
    return [f"{number}/{shards}" for number in range(1, shards + 1)]


def write_shard(questions: Path, shard: str, out: Path) -> None:
    """The questions of one shard. Raises BadInput where it has none, or is none."""
    number, slash, of = shard.partition("/")
    if not (slash and number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise InvalidInput(f"a shard is written as 2/8, got {shard!r}")
    units = -(-sum(1 for _ in read_records(questions, Question)) // BLOCK_SIZE)
    first, last = (units * at // int(of) * BLOCK_SIZE for at in (int(number) - 1, int(number)))
    if write_records(out, islice(read_records(questions, Question), first, last)) == 0:
        out.unlink()
        raise InvalidInput(f"{questions}: shard {shard} is empty: there are {units} units of {BLOCK_SIZE} questions")


def merge_shards(
    config: JudgeConfig, questions: Path, parts: Mapping[str, Sequence[Path]], outputs: Mapping[str, Path]
) -> Metrics:
    """Put the shards' files together; parts and outputs: regions, candidates, judgements, panel_report (and, of the
    outputs, scores).

    A judge that was left out of one shard is left out of all. Raises QuorumLost where too few judges are left then, and
    BadInput where the shards do not hold all questions, in their order.
    """
    counts = {len(paths) for paths in parts.values()}
    if counts in (set(), {0}) or len(counts) > 1:
        raise InvalidInput(f"expected as many files of every kind, got { {name: len(p) for name, p in parts.items()} }")
    regions = chain.from_iterable(read_records(path, Region) for path in parts["regions"])
    write_records(outputs["regions"], _check_order(questions, regions, parts["regions"]))
    write_records(
        outputs["candidates"], chain.from_iterable(read_records(path, Candidate) for path in parts["candidates"])
    )
    reports = [read_json_model(path, PanelReport) for path in parts["panel_report"]]
    judgements = chain.from_iterable(read_records(path, Judgement) for path in parts["judgements"])
    report = combine_panel(config, reports, judgements, outputs["judgements"], outputs["scores"])
    write_json(outputs["panel_report"], report.model_dump(mode="json"))
    return {"candidates": report.candidates, "scored": report.scored, "shards": len(reports)}


def _check_order(questions: Path, regions: Iterator[Region], parts: Sequence[Path]) -> Iterator[Region]:
    """The regions, checked: every question has some, in the questions' order."""
    waiting = (question.id for question in read_records(questions, Question))
    at = None
    for region in regions:
        if region.question != at:
            at = next(waiting, None)
            if region.question != at:
                raise InvalidInput(
                    f"{parts[0]} and {len(parts) - 1} more shards: expected regions of {at or 'no further question'}, "
                    f"got some of {region.question}; a shard is missing or out of order"
                )
        yield region
    if (missing := next(waiting, None)) is not None:
        raise InvalidInput(f"{questions}: {missing} has no regions in any of {len(parts)} shards")
