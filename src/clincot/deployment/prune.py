"""Which published checkpoints may go. What a pointer, a rollout or a kept checkpoint's decision names, stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clincot.deployment.deployment import find_referenced_checkpoints
from clincot.errors import InvalidInput
from clincot.models.checkpoint import MANIFEST
from clincot.registry.manifest import Manifest, build_checkpoint_key, iter_manifests, list_published_digests
from clincot.storage.store import Store


@dataclass(frozen=True)
class PruneResult:
    """What stays, with why, and what goes (digests)."""

    kept: dict[str, str]
    gone: tuple[str, ...]


def prune_checkpoints(store: Store, line: str, *, keep: int, really: bool) -> PruneResult:
    """Remove a line's checkpoints but the newest `keep` by round and those still named; `really`: do it.

    A decision names two checkpoints. It holds the other one (the champion that it was made against) for as long as the
    checkpoint that carries it stays; so do parent and base.
    """
    if keep < 0:
        raise InvalidInput(f"keep must not be negative, got {keep}")
    found = list(iter_manifests(store, line))
    kept = find_referenced_checkpoints(store, line)
    kept |= {m.sha256: "one of the newest" for m in found[len(found) - min(keep, len(found)) :] if m.sha256 not in kept}
    measured = {m.measured: m.sha256 for m in found}
    waiting = [m for m in found if m.sha256 in kept]
    while waiting:
        manifest = waiting.pop()
        for digest, why in _list_references(manifest):
            other = measured.get(digest, digest)
            if other not in kept:
                kept[other] = why
                waiting += [m for m in found if m.sha256 == other]
    gone = tuple(m.sha256 for m in found if m.sha256 not in kept)
    if really:
        for digest in gone:
            _delete_checkpoint(store, line, digest)
    return PruneResult({m.sha256: kept[m.sha256] for m in found if m.sha256 in kept}, gone)


def prune_unfinished(store: Store, line: str, *, really: bool) -> tuple[str, ...]:
    """Folders without a manifest: publications that were interrupted, or are under way right now."""
    folders = {key.split("/")[2] for key in store.keys(f"models/{line}/") if key.count("/") > 2}
    found = tuple(sorted(folders - set(list_published_digests(store, line))))
    if really:
        for digest in found:
            _delete_checkpoint(store, line, digest)
    return found


def _list_references(manifest: Manifest) -> Sequence[tuple[str, str]]:
    short = manifest.sha256[:12]
    held = [(manifest.base, f"the base of {short}")]
    if manifest.decision is not None:
        held += [
            (manifest.decision.champion, f"{manifest.decision.id}"),
            (manifest.decision.challenger, f"{manifest.decision.id}"),
        ]
    return [(digest, why) for digest, why in held if digest]


def _delete_checkpoint(store: Store, line: str, digest: str) -> None:
    """The manifest first: from then on the checkpoint does not exist, whatever else is still there."""
    store.delete(f"{build_checkpoint_key(line, digest)}/{MANIFEST}")
    for key in list(store.keys(f"{build_checkpoint_key(line, digest)}/")):
        store.delete(key)
