"""What a round starts from: the line's champion, verified; for a line without one, the base policy as round 0."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from clincot.config import PreflightConfig, resolve_path
from clincot.errors import InvalidInput
from clincot.models.checkpoint import check_weight_files, check_weight_headers, hash_checkpoint
from clincot.preflight.preflight_report import PreflightCheck, fail_check, pass_check
from clincot.preflight.probe import Probe
from clincot.records import StartingPolicy
from clincot.registry.champion import NoChampion, read_champion
from clincot.registry.manifest import (
    CorruptCheckpoint,
    Manifest,
    NotPublished,
    download_checkpoint,
    find_manifest,
    hash_manifest_files,
    read_manifest,
    verify_checkpoint,
)
from clincot.storage.open import open_store
from clincot.storage.store import Store

_DIGEST_PATTERN = re.compile(r"[0-9a-f]{6,64}")


def build_champion_probes(config: PreflightConfig, start: list[StartingPolicy]) -> list[Probe]:
    tried = f"the champion of {config.publish.name}, and its files"
    mend = "`clincot models show champion` says what is wrong; `clincot models rollback` goes back to the one before"
    return [Probe("champion", tried, mend, config.verify_s, lambda: _check_champion(config, start, tried))]


def _check_champion(config: PreflightConfig, start: list[StartingPolicy], tried: str) -> Iterator[PreflightCheck]:
    try:
        policy, how = resolve_starting_policy(config)
    except (NoChampion, NotPublished) as error:
        mend = (
            "publish the base model and `clincot models start` it, or name a checkpoint as preflight.base (--base): it "
            "is then round 0"
        )
        yield fail_check("champion", tried, str(error), mend)
        return
    except CorruptCheckpoint as error:
        mend = "publish this checkpoint again, or `clincot models rollback` to one that is whole"
        yield fail_check("champion", tried, str(error), mend)
        return
    start.append(policy)
    yield pass_check("champion", tried, f"{how}: {policy.sha256[:12]}, round {policy.round}, {policy.uri}")


def resolve_starting_policy(config: PreflightConfig) -> tuple[StartingPolicy, str]:
    """The round's starting policy, its files read and found right, and how it was found.

    The base is taken only where there is certainly no champion: a store that cannot be read is an error, never a base.
    Raises NoChampion, NotPublished, Corrupt, StoreFailed, BadInput.
    """
    line, url = config.publish.name, config.publish.store
    store = open_store(url) if url else None
    if store is not None:
        try:
            champion = read_champion(store, line)
        except NoChampion:
            if not config.base:
                raise
        else:
            manifest = read_manifest(store, line, champion.now.sha256)
            return _verify_published(store, manifest, "champion"), f"move {champion.now.number} of the pointer"
    if not config.base:
        raise NoChampion("no store is named (publish.store), and no base policy either (preflight.base)")
    return _resolve_base(store, line, config.base), "no champion yet, so preflight.base"


def _resolve_base(store: Store | None, line: str, given: str) -> StartingPolicy:
    folder = resolve_path(given)
    if folder.is_dir():
        check_weight_files(folder)
        check_weight_headers(folder)
        digest = hash_checkpoint(folder)
        return StartingPolicy(
            line=line, uri=str(folder.absolute()), sha256=digest, round=0, source="base", published=False
        )
    if store is None or not _DIGEST_PATTERN.fullmatch(given):
        raise InvalidInput(
            f"preflight.base: {given} is no folder"
            + (" (and no store is named in which it could be published)" if store is None else " and no digest")
        )
    return _verify_published(store, find_manifest(store, line, given), "base")


def _verify_published(store: Store, manifest: Manifest, source: str) -> StartingPolicy:
    """The published checkpoint, every file of it read and compared."""
    if manifest.kind == "adapter":
        raise InvalidInput(
            f"{manifest.uri}: is an adapter alone, and a round starts from a whole checkpoint; publish it merged "
            "(publish.adapter: merge)"
        )
    verify_checkpoint(store, manifest)
    if (found := hash_manifest_files(manifest)) != manifest.sha256:
        raise CorruptCheckpoint(
            f"{manifest.uri}: its files make the digest {found[:12]}, it lies under {manifest.sha256[:12]}"
        )
    return StartingPolicy.model_validate(
        {
            "line": manifest.line,
            "uri": manifest.uri,
            "sha256": manifest.sha256,
            "source": source,
            "published": True,
            "round": manifest.round if source == "champion" else 0,
        }
    )


def fetch_starting_policy(start: StartingPolicy, store_url: str, folder: Path) -> Path:
    """The starting policy as a folder: below `folder`, from the store, or where an unpublished base lies. Verified.

    Raises Corrupt, NotPublished, StoreFailed; BadInput where the base has changed since preflight looked at it.
    """
    if not start.published:
        place = Path(start.uri)
        if (found := hash_checkpoint(place)) != start.sha256:
            raise InvalidInput(f"{place}: is {found[:12]} by now, the round started from {start.sha256[:12]}")
        return place
    store = open_store(store_url)
    return download_checkpoint(store, read_manifest(store, start.line, start.sha256), folder)
