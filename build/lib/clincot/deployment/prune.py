"""Removal of old published checkpoints.

A checkpoint stays if the champion pointer, a rollout, or the decision of a kept checkpoint names it.
"""

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
    """The digests of the checkpoints that stay, with the reason, and of the others."""

    kept: dict[str, str]
    gone: tuple[str, ...]


def prune_checkpoints(store: Store, line: str, *, keep: int, really: bool) -> PruneResult:
    """Remove a model line's old checkpoints.

    A checkpoint stays if it is among the newest `keep` by round, or still named.
    A decision names two checkpoints: as long as the checkpoint that carries it stays, so does the champion that it was
    compared with. The base of an adapter stays likewise.
    really: delete them; otherwise only report what would be deleted. Raises InvalidInput if `keep` is negative.
    """
    if keep < 0:
        raise InvalidInput(f"keep must not be negative, got {keep}")
    manifests = list(iter_manifests(store, line))
    kept = find_referenced_checkpoints(store, line)
    for manifest in manifests[len(manifests) - min(keep, len(manifests)) :]:
        kept.setdefault(manifest.sha256, "one of the newest")
    # decisions name a checkpoint by its measured digest, which differs from the published one for an adapter
    published = {manifest.measured: manifest.sha256 for manifest in manifests}
    # follow references transitively: what a kept checkpoint names is kept, too
    waiting = [manifest for manifest in manifests if manifest.sha256 in kept]
    while waiting:
        for digest, reason in _list_references(waiting.pop()):
            other = published.get(digest, digest)
            if other not in kept:
                kept[other] = reason
                waiting += [manifest for manifest in manifests if manifest.sha256 == other]
    gone = tuple(manifest.sha256 for manifest in manifests if manifest.sha256 not in kept)
    if really:
        for digest in gone:
            _delete_checkpoint(store, line, digest)
    return PruneResult({m.sha256: kept[m.sha256] for m in manifests if m.sha256 in kept}, gone)


def prune_unfinished(store: Store, line: str, *, really: bool) -> tuple[str, ...]:
    """Remove folders without a manifest.

    The publication of such a checkpoint was interrupted, or is in progress. Returns their digests.
    really: delete them; otherwise only report them.
    """
    folders = {key.split("/")[2] for key in store.keys(f"models/{line}/") if key.count("/") > 2}
    unfinished = tuple(sorted(folders - set(list_published_digests(store, line))))
    if really:
        for digest in unfinished:
            _delete_checkpoint(store, line, digest)
    return unfinished


def _list_references(manifest: Manifest) -> Sequence[tuple[str, str]]:
    """(digest, reason) of every checkpoint that this one needs."""
    references = [(manifest.base, f"the base of {manifest.sha256[:12]}")]
    decision = manifest.decision
    if decision is not None:
        references += [(decision.champion, decision.id), (decision.challenger, decision.id)]
    return [(digest, reason) for digest, reason in references if digest]


def _delete_checkpoint(store: Store, line: str, digest: str) -> None:
    """Delete a checkpoint, its manifest first.

    An interrupted removal then leaves no published checkpoint with missing files.
    """
    store.delete(f"{build_checkpoint_key(line, digest)}/{MANIFEST}")
    for key in list(store.keys(f"{build_checkpoint_key(line, digest)}/")):
        store.delete(key)
