"""What a round starts from: the line's champion, verified; for a line without one, the base policy as round 0."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from clincot.config import PreflightSection
from clincot.errors import BadInput
from clincot.models.checkpoint import check_headers, check_whole, checkpoint_digest
from clincot.preflight.preflight_report import Check, failed, passed
from clincot.preflight.probe import Probe
from clincot.records import StartingPolicy
from clincot.registry.champion import NoChampion, read_champion
from clincot.registry.manifest import (
    Corrupt,
    Manifest,
    NotPublished,
    fetch,
    find_manifest,
    published_files_digest,
    read_manifest,
    verify,
)
from clincot.storage.open import open_store
from clincot.storage.store import Store

_DIGEST = re.compile(r"[0-9a-f]{6,64}")


def probes(section: PreflightSection, start: list[StartingPolicy]) -> list[Probe]:
    tried = f"the champion of {section.publish.name}, and its files"
    mend = "`clincot models show champion` says what is wrong; `clincot models rollback` goes back to the one before"
    return [Probe("champion", tried, mend, section.verify_s, lambda: _look(section, start, tried))]


def _look(section: PreflightSection, start: list[StartingPolicy], tried: str) -> Iterator[Check]:
    try:
        policy, how = resolve(section)
    except (NoChampion, NotPublished) as error:
        mend = (
            "publish the base model and `clincot models start` it, or name a checkpoint as preflight.base (--base): it "
            "is then round 0"
        )
        yield failed("champion", tried, str(error), mend)
        return
    except Corrupt as error:
        mend = "publish this checkpoint again, or `clincot models rollback` to one that is whole"
        yield failed("champion", tried, str(error), mend)
        return
    start.append(policy)
    yield passed("champion", tried, f"{how}: {policy.sha256[:12]}, round {policy.round}, {policy.uri}")


def resolve(section: PreflightSection) -> tuple[StartingPolicy, str]:
    """The round's starting policy, its files read and found right, and how it was found.

    The base is taken only where there is certainly no champion: a store that cannot be read is an error, never a base.
    Raises NoChampion, NotPublished, Corrupt, StoreFailed, BadInput.
    """
    line, url = section.publish.name, section.publish.store
    store = open_store(url) if url else None
    if store is not None:
        try:
            champion = read_champion(store, line)
        except NoChampion:
            if not section.base:
                raise
        else:
            manifest = read_manifest(store, line, champion.now.sha256)
            return _published(store, manifest, "champion"), f"move {champion.now.number} of the pointer"
    if not section.base:
        raise NoChampion("no store is named (publish.store), and no base policy either (preflight.base)")
    return _base(store, line, section.base), "no champion yet, so preflight.base"


def _base(store: Store | None, line: str, given: str) -> StartingPolicy:
    folder = Path(given)
    if folder.is_dir():
        check_whole(folder)
        check_headers(folder)
        digest = checkpoint_digest(folder)
        return StartingPolicy(
            line=line, uri=str(folder.absolute()), sha256=digest, round=0, source="base", published=False
        )
    if store is None or not _DIGEST.fullmatch(given):
        raise BadInput(
            f"preflight.base: {given} is no folder"
            + (" (and no store is named in which it could be published)" if store is None else " and no digest")
        )
    return _published(store, find_manifest(store, line, given), "base")


def _published(store: Store, manifest: Manifest, source: str) -> StartingPolicy:
    """The published checkpoint, every file of it read and compared."""
    if manifest.kind == "adapter":
        raise BadInput(
            f"{manifest.uri}: is an adapter alone, and a round starts from a whole checkpoint; publish it merged "
            "(publish.adapter: merge)"
        )
    verify(store, manifest)
    if (found := published_files_digest(manifest)) != manifest.sha256:
        raise Corrupt(f"{manifest.uri}: its files make the digest {found[:12]}, it lies under {manifest.sha256[:12]}")
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


def fetch_policy(start: StartingPolicy, store_url: str, folder: Path) -> Path:
    """The starting policy as a folder: below `folder`, from the store, or where an unpublished base lies. Verified.

    Raises Corrupt, NotPublished, StoreFailed; BadInput where the base has changed since preflight looked at it.
    """
    if not start.published:
        place = Path(start.uri)
        if (found := checkpoint_digest(place)) != start.sha256:
            raise BadInput(f"{place}: is {found[:12]} by now, the round started from {start.sha256[:12]}")
        return place
    store = open_store(store_url)
    return fetch(store, read_manifest(store, start.line, start.sha256), folder)
