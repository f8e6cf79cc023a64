"""Describe the preference data of a round from its files: digests, counts, policies, judges."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from clincot.jsonl import InvalidRecord, read_json_model, read_records
from clincot.judging.combination import PanelReport
from clincot.preferences.pairs import PairReport
from clincot.records import Candidate, DataFile, DataVersion, PreferencePair, Question, hash_json

# Input of the version stage -> file name in the data repository.
FILE_NAMES = {
    "questions": "questions.jsonl",
    "regions": "regions.jsonl",
    "candidates": "candidates.jsonl",
    "judgements": "judgements.jsonl",
    "scores": "scores.jsonl",
    "panel_report": "panel_report.json",
    "pairs": "pairs.jsonl",
    "pair_report": "pair_report.json",
    "steps": "steps.json",
}


def describe_version(inputs: Mapping[str, Path]) -> DataVersion:
    """Build the (uncommitted) version of these files; records are streamed, not held in memory.

    Raises InvalidRecord if a file does not hold the records that its name promises, or if the pairs or candidates are
    not those of the pair report.
    """
    panel = read_json_model(inputs["panel_report"], PanelReport)
    report = read_json_model(inputs["pair_report"], PairReport)
    pairs = sum(1 for _ in read_records(inputs["pairs"], PreferencePair))
    if pairs != report.pairs:
        raise InvalidRecord(
            f"{inputs['pairs']}: holds {pairs} pairs, but {inputs['pair_report']} reports {report.pairs}"
        )
    policies: set[str] = set()
    candidates = 0
    for candidate in read_records(inputs["candidates"], Candidate):
        policies.add(candidate.policy)
        candidates += 1
    if candidates != report.candidates:
        raise InvalidRecord(
            f"{inputs['candidates']}: holds {candidates} candidates, but {inputs['pair_report']} was made from "
            f"{report.candidates}"
        )
    hashed = [_hash_data_file(FILE_NAMES[name], path) for name, path in inputs.items()]
    files = tuple(sorted(hashed, key=lambda file: file.name))
    return DataVersion(
        sha256=hash_json([[file.name, file.sha256] for file in files]),
        files=files,
        pairs=pairs,
        questions=sum(1 for _ in read_records(inputs["questions"], Question)),
        candidates=candidates,
        policies=tuple(sorted(policies)),
        judges={judge.name: judge.digest for judge in panel.judges},
        alpha=panel.alpha_calibrated.value,
    )


def _hash_data_file(name: str, path: Path) -> DataFile:
    """Digests and size in one pass; md5 is the name under which DVC stores the file."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            md5.update(block)
            size += len(block)
    return DataFile(name=name, sha256=sha256.hexdigest(), md5=md5.hexdigest(), size=size)
