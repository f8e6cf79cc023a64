"""Splits the questions of a round into shards, and merges the files of the shards.

A shard consists of whole, consecutive blocks (batching.py). So the regions, answers and scores of a question are the
same bytes, whichever shard contains it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from clincot.batching import BLOCK_SIZE, bound_parts
from clincot.config import JudgeConfig
from clincot.errors import InvalidInput
from clincot.jsonl import read_records, write_records
from clincot.records import Candidate, Question, Region
from clincot.stages.base import Metrics
from clincot.stages.judge import merge_judgements


def list_shard_names(questions: Path, shards: int) -> list[str]:
    """Return the names of the shards: "1/3", "2/3", "3/3". Raises InvalidInput if a shard would be empty."""
    count = sum(1 for _ in read_records(questions, Question))
    blocks = -(-count // BLOCK_SIZE)
    if shards > blocks:
        raise InvalidInput(
            f"{questions}: {count} questions are {blocks} block(s) of {BLOCK_SIZE}, too few for {shards} shards: "
            f"{shards - blocks} would be empty; use at most {blocks} (--shards)"
        )
    return [f"{number}/{shards}" for number in range(1, shards + 1)]


def group_shards(names: Sequence[str], groups: int) -> list[str]:
    """Distribute shards over tasks: "1-3/8" are the shards 1/8, 2/8 and 3/8. No group is empty.

    names: of all shards, in their order. groups: their largest number.
    """
    return [f"{first + 1}-{last}/{len(names)}" for first, last in bound_parts(len(names), groups)]


def parse_shard_group(group: str) -> list[str]:
    """Return the names of the shards of a group. Raises InvalidInput."""
    match = re.fullmatch(r"(\d+)-(\d+)/(\d+)", group)
    first, last, total = map(int, match.groups()) if match else (0, 0, 0)
    if not 1 <= first <= last <= total:
        raise InvalidInput(f"a group of shards must be written as 1-3/8, got {group!r}")
    return [f"{number}/{total}" for number in range(first, last + 1)]


def write_shard(questions: Path, shard: str, out: Path) -> None:
    """Write the questions of one shard. Raises InvalidInput if the name is malformed or the shard is empty."""
    number, slash, total = shard.partition("/")
    if not (slash and number.isdigit() and total.isdigit() and 1 <= int(number) <= int(total)):
        raise InvalidInput(f"the name of a shard must be written as 2/8, got {shard!r}")
    blocks = -(-sum(1 for _ in read_records(questions, Question)) // BLOCK_SIZE)
    start, end = (blocks * boundary // int(total) * BLOCK_SIZE for boundary in (int(number) - 1, int(number)))
    if write_records(out, islice(read_records(questions, Question), start, end)) == 0:
        out.unlink()
        raise InvalidInput(
            f"{questions}: shard {shard} is empty: there are {blocks} block(s) of {BLOCK_SIZE} questions"
        )


def merge_shards(
    config: JudgeConfig, questions: Path, parts: Mapping[str, Sequence[Path]], outputs: Mapping[str, Path]
) -> Metrics:
    """Merge the files of the shards.

    parts: regions, candidates, judgements and panel_report, in the order of the shards. outputs: the same and scores.
    A judge that is excluded from one shard is excluded from all. Raises QuorumLost if too few judges remain, and
    InvalidInput if the shards do not contain all questions in their order.
    """
    counts = {len(paths) for paths in parts.values()}
    if counts in (set(), {0}) or len(counts) > 1:
        found = {name: len(paths) for name, paths in parts.items()}
        raise InvalidInput(f"expected the same number of files of every kind, at least one, got {found}")
    regions = chain.from_iterable(read_records(path, Region) for path in parts["regions"])
    write_records(outputs["regions"], _check_order(questions, regions, parts["regions"]))
    write_records(
        outputs["candidates"], chain.from_iterable(read_records(path, Candidate) for path in parts["candidates"])
    )
    report = merge_judgements(config, parts["judgements"], parts["panel_report"], outputs)
    return {"candidates": report.candidates, "scored": report.scored, "shards": len(parts["judgements"])}


def _check_order(questions: Path, regions: Iterator[Region], parts: Sequence[Path]) -> Iterator[Region]:
    """Yield the regions; raise InvalidInput unless every question has some, in the order of the questions."""
    remaining = (question.id for question in read_records(questions, Question))
    current = None
    for region in regions:
        if region.question != current:
            current = next(remaining, None)
            if region.question != current:
                raise InvalidInput(
                    f"{parts[0]} and {len(parts) - 1} more shards: expected regions of "
                    f"{current or 'no further question'}, got some of {region.question}; a shard is missing or out of "
                    "order"
                )
        yield region
    if (missing := next(remaining, None)) is not None:
        raise InvalidInput(f"{questions}: {missing} has no regions in any of {len(parts)} shards")
