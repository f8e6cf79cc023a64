"""The versions of a data repository, and what lies between two of them."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from clincot.config import VersionConfig
from clincot.errors import InvalidInput
from clincot.fields import FiniteFloat, FrozenModel
from clincot.jsonl import InvalidRecord, hash_files, read_records
from clincot.preferences.versions.commit import TAG_PREFIX, open_temporary_clone, read_versions
from clincot.preferences.versions.dvc import DATA_FOLDER, download_from_dvc
from clincot.preferences.versions.git import Git
from clincot.records import DataVersion, PreferencePair

Count = Annotated[int, Field(ge=0)]
PAIRS_FILE = "pairs.jsonl"


class ChangeSummary(FrozenModel):
    """How a number moved from A to B over the pairs that both have: B - A."""

    mean: FiniteFloat
    mean_absolute: FiniteFloat
    lowest: FiniteFloat
    median: FiniteFloat
    highest: FiniteFloat


class PairDiff(FrozenModel):
    """Pairs of two versions. The same pair: the same two candidates of one question, whichever is the better one.

    in_a = removed + rescored + unchanged, in_b = added + rescored + unchanged.
    """

    in_a: Count
    in_b: Count
    added: Count
    added_of_new_questions: Count  # of questions of which A has no pair
    removed: Count
    removed_of_gone_questions: Count
    unchanged: Count  # the same scores and spread
    rescored: Count
    turned: Count  # of those rescored: chosen has become rejected
    gap: ChangeSummary | None  # over the pairs of both; None: they share none
    chosen_score: ChangeSummary | None  # of the candidate that A has chosen
    rejected_score: ChangeSummary | None
    spread: ChangeSummary | None
    mean_gap_a: FiniteFloat | None
    mean_gap_b: FiniteFloat | None


def list_versions(config: VersionConfig, scratch: Path) -> list[DataVersion]:
    """All versions of the data repository, by round; `scratch` is a folder for the clone."""
    with open_temporary_clone(_require_repository(config), scratch / "clone") as git:
        return read_versions(git, config.repository)


def diff_versions(config: VersionConfig, a: str, b: str, scratch: Path) -> tuple[DataVersion, DataVersion, PairDiff]:
    """What changed from version a to b; each a round's number, a tag or (the beginning of) a commit.

    Raises BadInput where there is no such version, DvcFailed, BadRecord where its pairs are not those it names.
    """
    with open_temporary_clone(_require_repository(config), scratch / "clone") as git:
        known = read_versions(git, config.repository)
        one, other = (find_version(known, given, config.repository) for given in (a, b))
        files = [_download_pairs(git, version, scratch / side) for version, side in ((one, "a"), (other, "b"))]
        return one, other, compare_pairs(*(read_records(file, PreferencePair) for file in files))


def find_version(known: Sequence[DataVersion], given: str, repository: str) -> DataVersion:
    """The version of a round's number, a tag or (at least 6 characters of) a commit. Raises BadInput."""
    for version in known:
        if given in (str(version.round), version.tag, version.tag.removeprefix(TAG_PREFIX)):
            return version
    found = [version for version in known if len(given) >= 6 and version.revision.startswith(given)]
    if len(found) != 1:
        there = ", ".join(version.tag for version in known) or "none"
        raise InvalidInput(
            f"{repository}: no version is called {given!r} (a round, a tag or a commit); there are: {there}"
        )
    return found[0]


def compare_pairs(a: Iterable[PreferencePair], b: Iterable[PreferencePair]) -> PairDiff:
    """The difference of two files of pairs; of A a digest and three numbers a pair are held, no text."""
    before = {_hash_pair(pair): _extract_scores(pair) for pair in a}
    questions_a = {key[:16] for key in before}
    gaps_b, met, questions_b = [], set[bytes](), set[bytes]()
    added = new = unchanged = turned = 0
    moved: dict[str, list[float]] = {"gap": [], "chosen_score": [], "rejected_score": [], "spread": []}
    for pair in b:
        key = _hash_pair(pair)
        gaps_b.append(pair.gap)
        questions_b.add(key[:16])
        if key not in before:
            added += 1
            new += key[:16] not in questions_a
            continue
        met.add(key)
        (first, score_first, score_second, spread), (now, now_first, now_second, spread_now) = (
            before[key],
            _extract_scores(pair),
        )
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
    return PairDiff(
        in_a=len(before),
        in_b=len(gaps_b),
        added=added,
        added_of_new_questions=new,
        removed=len(gone),
        removed_of_gone_questions=sum(key[:16] not in questions_b for key in gone),
        unchanged=unchanged,
        rescored=len(met) - unchanged,
        turned=turned,
        mean_gap_a=_compute_mean([one[1] - one[2] for one in before.values()]),
        mean_gap_b=_compute_mean(gaps_b),
        **{name: _summarize_changes(changes) for name, changes in moved.items()},
    )


def _hash_pair(pair: PreferencePair) -> bytes:
    """32 bytes that name the question (16), and the two candidates without their order."""
    sides = "\n".join(sorted((pair.chosen, pair.rejected)))
    return _hash_text(pair.question) + _hash_text(f"{pair.step}\n{sides}")


def _extract_scores(pair: PreferencePair) -> tuple[bytes, float, float, float]:
    return _hash_text(pair.chosen), pair.chosen_score, pair.rejected_score, pair.spread


def _hash_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _summarize_changes(changes: list[float]) -> ChangeSummary | None:
    if not changes:
        return None
    return ChangeSummary(
        mean=statistics.fmean(changes),
        mean_absolute=statistics.fmean(abs(c) for c in changes),
        lowest=min(changes),
        median=statistics.median(changes),
        highest=max(changes),
    )


def _compute_mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _download_pairs(git: Git, version: DataVersion, folder: Path) -> Path:
    """The version's pairs.jsonl, fetched from the DVC remote and checked."""
    path = download_from_dvc(git.folder, version.revision, f"{DATA_FOLDER}/{PAIRS_FILE}", folder / PAIRS_FILE)
    expected = next(file.sha256 for file in version.files if file.name == PAIRS_FILE)
    if (came := hash_files(path)) != expected:
        raise InvalidRecord(f"{version.tag}: {PAIRS_FILE} came with sha256 {came}, the version says {expected}")
    return path


def _require_repository(config: VersionConfig) -> VersionConfig:
    if not config.repository:
        raise InvalidInput("no data repository is named; expected --repository or version.repository in params.yaml")
    return config
