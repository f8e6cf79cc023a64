"""The versions of a data repository, and what lies between two of them."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from clincot.config import VersionSection
from clincot.errors import BadInput
from clincot.jsonl import BadRecord, file_digest, read_records
from clincot.preferences.versions.commit import TAGS, cloned, versions
from clincot.preferences.versions.dvc import FOLDER, fetched
from clincot.preferences.versions.git import Git
from clincot.records import DataVersion, Finite, PreferencePair

Count = Annotated[int, Field(ge=0)]
PAIRS = "pairs.jsonl"


class Movement(BaseModel):
    """How a number moved from A to B over the pairs that both have: B - A."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: Finite
    mean_absolute: Finite
    lowest: Finite
    median: Finite
    highest: Finite


class PairDifference(BaseModel):
    """Pairs of two versions. The same pair: the same two candidates of one question, whichever is the better one.

    in_a = removed + rescored + unchanged, in_b = added + rescored + unchanged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_a: Count
    in_b: Count
    added: Count
    added_of_new_questions: Count  # of questions of which A has no pair
    removed: Count
    removed_of_gone_questions: Count
    unchanged: Count  # the same scores and spread
    rescored: Count
    turned: Count  # of those rescored: chosen has become rejected
    gap: Movement | None  # over the pairs of both; None: they share none
    chosen_score: Movement | None  # of the candidate that A has chosen
    rejected_score: Movement | None
    spread: Movement | None
    mean_gap_a: Finite | None
    mean_gap_b: Finite | None


def log(section: VersionSection, scratch: Path) -> list[DataVersion]:
    """All versions of the data repository, by round; `scratch` is a folder for the clone."""
    with cloned(_named(section), scratch / "clone") as git:
        return versions(git, section.repository)


def diff(section: VersionSection, a: str, b: str, scratch: Path) -> tuple[DataVersion, DataVersion, PairDifference]:
    """What changed from version a to b; each a round's number, a tag or (the beginning of) a commit.

    Raises BadInput where there is no such version, DvcFailed, BadRecord where its pairs are not those it names.
    """
    with cloned(_named(section), scratch / "clone") as git:
        known = versions(git, section.repository)
        one, other = (find(known, given, section.repository) for given in (a, b))
        files = [_pairs_of(git, version, scratch / side) for version, side in ((one, "a"), (other, "b"))]
        return one, other, compare(*(read_records(file, PreferencePair) for file in files))


def find(known: Sequence[DataVersion], given: str, repository: str) -> DataVersion:
    """The version of a round's number, a tag or (at least 6 characters of) a commit. Raises BadInput."""
    for version in known:
        if given in (str(version.round), version.tag, version.tag.removeprefix(TAGS)):
            return version
    found = [version for version in known if len(given) >= 6 and version.revision.startswith(given)]
    if len(found) != 1:
        there = ", ".join(version.tag for version in known) or "none"
        raise BadInput(f"{repository}: no version is called {given!r} (a round, a tag or a commit); there are: {there}")
    return found[0]


def compare(a: Iterable[PreferencePair], b: Iterable[PreferencePair]) -> PairDifference:
    """The difference of two files of pairs; of A a digest and three numbers a pair are held, no text."""
    before = {_same(pair): _seen(pair) for pair in a}
    questions_a = {key[:16] for key in before}
    gaps_b, met, questions_b = [], set[bytes](), set[bytes]()
    added = new = unchanged = turned = 0
    moved: dict[str, list[float]] = {"gap": [], "chosen_score": [], "rejected_score": [], "spread": []}
    for pair in b:
        key = _same(pair)
        gaps_b.append(pair.gap)
        questions_b.add(key[:16])
        if key not in before:
            added += 1
            new += key[:16] not in questions_a
            continue
        met.add(key)
        (first, score_first, score_second, spread), (now, now_first, now_second, spread_now) = before[key], _seen(pair)
        if first != now:  # seen from the candidate that A has chosen
            turned += 1
            now_first, now_second = now_second, now_first
        changes = (
            (now_first - now_second) - (score_first - score_second),
            now_first - score_first,
            now_second - score_second,
            spread_now - spread,
        )
        unchanged += not any(changes)
        for name, change in zip(moved, changes, strict=True):
            moved[name].append(change)
    gone = [key for key in before if key not in met]
    return PairDifference(
        in_a=len(before),
        in_b=len(gaps_b),
        added=added,
        added_of_new_questions=new,
        removed=len(gone),
        removed_of_gone_questions=sum(key[:16] not in questions_b for key in gone),
        unchanged=unchanged,
        rescored=len(met) - unchanged,
        turned=turned,
        mean_gap_a=_mean([one[1] - one[2] for one in before.values()]),
        mean_gap_b=_mean(gaps_b),
        **{name: _movement(changes) for name, changes in moved.items()},
    )


def _same(pair: PreferencePair) -> bytes:
    """32 bytes that name the question (16), and the two candidates without their order."""
    sides = "\n".join(sorted((pair.chosen, pair.rejected)))
    return _short(pair.question) + _short(f"{pair.step}\n{sides}")


def _seen(pair: PreferencePair) -> tuple[bytes, float, float, float]:
    return _short(pair.chosen), pair.chosen_score, pair.rejected_score, pair.spread


def _short(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _movement(changes: list[float]) -> Movement | None:
    if not changes:
        return None
    return Movement(
        mean=statistics.fmean(changes),
        mean_absolute=statistics.fmean(abs(c) for c in changes),
        lowest=min(changes),
        median=statistics.median(changes),
        highest=max(changes),
    )


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _pairs_of(git: Git, version: DataVersion, folder: Path) -> Path:
    """The version's pairs.jsonl, fetched from the DVC remote and checked."""
    path = fetched(git.folder, version.revision, f"{FOLDER}/{PAIRS}", folder / PAIRS)
    expected = next(file.sha256 for file in version.files if file.name == PAIRS)
    if (came := file_digest(path)) != expected:
        raise BadRecord(f"{version.tag}: {PAIRS} came with sha256 {came}, the version says {expected}")
    return path


def _named(section: VersionSection) -> VersionSection:
    if not section.repository:
        raise BadInput("no data repository is named; expected --repository or version.repository in params.yaml")
    return section
