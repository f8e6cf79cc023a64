"""List the versions of a data repository and compare two of them."""

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
from clincot.preferences.versions.commit import open_temporary_clone, read_versions
from clincot.preferences.versions.dvc import DATA_FOLDER, download_from_dvc
from clincot.preferences.versions.git import Git
from clincot.preferences.versions.tags import list_version_names
from clincot.records import DataVersion, PreferencePair

Count = Annotated[int, Field(ge=0)]
PAIRS_FILE = "pairs.jsonl"


class ChangeSummary(FrozenModel):
    """How a number changed from A to B (B - A) over the pairs that both have."""

    mean: FiniteFloat
    mean_absolute: FiniteFloat
    lowest: FiniteFloat
    median: FiniteFloat
    highest: FiniteFloat


class PairDiff(FrozenModel):
    """The pairs of two versions compared; two pairs are the same if they have the same two candidates, in any order.

    in_a = removed + rescored + unchanged and in_b = added + rescored + unchanged.
    """

    in_a: Count
    in_b: Count
    added: Count
    added_of_new_questions: Count  # pairs of questions for which A has no pair
    removed: Count
    removed_of_gone_questions: Count  # pairs of questions for which B has no pair
    unchanged: Count  # same scores and spread
    rescored: Count
    turned: Count  # rescored pairs whose chosen and rejected candidates are swapped
    gap: ChangeSummary | None  # over the shared pairs; None: no pair is shared
    chosen_score: ChangeSummary | None  # score of the candidate that is chosen in A
    rejected_score: ChangeSummary | None
    spread: ChangeSummary | None
    mean_gap_a: FiniteFloat | None
    mean_gap_b: FiniteFloat | None


def list_versions(config: VersionConfig, scratch: Path) -> list[DataVersion]:
    """All versions of the data repository, by line and round; `scratch` is a folder for a temporary clone."""
    with open_temporary_clone(_require_repository(config), scratch / "clone") as git:
        return read_versions(git, config.repository)


def diff_versions(config: VersionConfig, a: str, b: str, scratch: Path) -> tuple[DataVersion, DataVersion, PairDiff]:
    """Compare version a with version b, each named by its round, its tag or (the beginning of) its commit.

    Returns both versions and the difference of their pairs. Raises InvalidInput if there is no such version, DvcFailed,
    and InvalidRecord if the downloaded pairs are not those of the version.
    """
    with open_temporary_clone(_require_repository(config), scratch / "clone") as git:
        versions = read_versions(git, config.repository)
        version_a, version_b = (find_version(versions, name, config.repository) for name in (a, b))
        pairs_a = _download_pairs(git, version_a, scratch / "a")
        pairs_b = _download_pairs(git, version_b, scratch / "b")
        diff = compare_pairs(read_records(pairs_a, PreferencePair), read_records(pairs_b, PreferencePair))
        return version_a, version_b, diff


def find_version(versions: Sequence[DataVersion], name: str, repository: str) -> DataVersion:
    """Find a version by its round (3, or nodules/3 where several lines have one), its tag, or its commit.

    Of a commit at least 6 characters are needed. Raises InvalidInput if there is none, or more than one.
    """
    matches = [version for version in versions if name in list_version_names(version)]
    if not matches and len(name) >= 6:
        matches = [version for version in versions if version.revision.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    tags = ", ".join(version.tag for version in matches or versions) or "none"
    if matches:
        raise InvalidInput(f"{repository}: {name!r} names {len(matches)} versions: {tags}; name one by its tag")
    raise InvalidInput(f"{repository}: no version is called {name!r} (a round, a tag or a commit); there are: {tags}")


def compare_pairs(a: Iterable[PreferencePair], b: Iterable[PreferencePair]) -> PairDiff:
    """Compare two streams of pairs; only a digest and the numbers of each pair of A are held in memory, no text."""
    scores_a = {_hash_pair(pair): _extract_scores(pair) for pair in a}
    questions_a = {key[:16] for key in scores_a}
    gaps_b, shared, questions_b = [], set[bytes](), set[bytes]()
    added = added_of_new_questions = unchanged = turned = 0
    changes: dict[str, list[float]] = {"gap": [], "chosen_score": [], "rejected_score": [], "spread": []}
    for pair in b:
        key = _hash_pair(pair)
        gaps_b.append(pair.gap)
        questions_b.add(key[:16])
        if key not in scores_a:
            added += 1
            added_of_new_questions += key[:16] not in questions_a
            continue
        shared.add(key)
        chosen_a, chosen_score_a, rejected_score_a, spread_a = scores_a[key]
        chosen_b, chosen_score_b, rejected_score_b, spread_b = _extract_scores(pair)
        if chosen_a != chosen_b:  # compare candidate with candidate, in the order of A
            turned += 1
            chosen_score_b, rejected_score_b = rejected_score_b, chosen_score_b
        pair_changes = (
            (chosen_score_b - rejected_score_b) - (chosen_score_a - rejected_score_a),
            chosen_score_b - chosen_score_a,
            rejected_score_b - rejected_score_a,
            spread_b - spread_a,
        )
        unchanged += not any(pair_changes)
        for name, change in zip(changes, pair_changes, strict=True):
            changes[name].append(change)
    removed = [key for key in scores_a if key not in shared]
    return PairDiff(
        in_a=len(scores_a),
        in_b=len(gaps_b),
        added=added,
        added_of_new_questions=added_of_new_questions,
        removed=len(removed),
        removed_of_gone_questions=sum(key[:16] not in questions_b for key in removed),
        unchanged=unchanged,
        rescored=len(shared) - unchanged,
        turned=turned,
        mean_gap_a=_compute_mean([chosen - rejected for _, chosen, rejected, _ in scores_a.values()]),
        mean_gap_b=_compute_mean(gaps_b),
        **{name: _summarize_changes(values) for name, values in changes.items()},
    )


def _hash_pair(pair: PreferencePair) -> bytes:
    """32 bytes: 16 for the question, 16 for the step and the two candidates in any order."""
    sides = "\n".join(sorted((pair.chosen, pair.rejected)))
    return _hash_text(pair.question) + _hash_text(f"{pair.step}\n{sides}")


def _extract_scores(pair: PreferencePair) -> tuple[bytes, float, float, float]:
    """(digest of the chosen candidate, chosen score, rejected score, spread)."""
    return _hash_text(pair.chosen), pair.chosen_score, pair.rejected_score, pair.spread


def _hash_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _summarize_changes(changes: list[float]) -> ChangeSummary | None:
    if not changes:
        return None
    return ChangeSummary(
        mean=statistics.fmean(changes),
        mean_absolute=statistics.fmean(abs(change) for change in changes),
        lowest=min(changes),
        median=statistics.median(changes),
        highest=max(changes),
    )


def _compute_mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _download_pairs(git: Git, version: DataVersion, folder: Path) -> Path:
    """Download the version's pairs.jsonl from the DVC remote and verify its digest."""
    path = download_from_dvc(git.folder, version.revision, f"{DATA_FOLDER}/{PAIRS_FILE}", folder / PAIRS_FILE)
    expected = next(file.sha256 for file in version.files if file.name == PAIRS_FILE)
    if (actual := hash_files(path)) != expected:
        raise InvalidRecord(f"{version.tag}: expected {PAIRS_FILE} with sha256 {expected}, got {actual}")
    return path


def _require_repository(config: VersionConfig) -> VersionConfig:
    if not config.repository:
        raise InvalidInput("no data repository is named; expected --repository or version.repository in params.yaml")
    return config
