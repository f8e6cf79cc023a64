"""Pruning: checkpoints that are still named stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.config import DeployConfig
from clincot.deployment.deployment import start_rollout
from clincot.deployment.prune import prune_checkpoints, prune_unfinished
from clincot.registry import champion
from clincot.registry.manifest import list_published_digests
from clincot.storage.folder_store import FolderStore
from tests.support.deployment_builders import LINE, published


def test_named_checkpoints_are_kept(tmp_path: Path) -> None:
    """base <- first (champion) <- second (rollout begun); rival is decided against first; nothing names stray."""
    store = FolderStore(tmp_path / "store")
    base = published(store, tmp_path, 0.0)
    first = published(store, tmp_path, 1.0, over=base)
    champion.create_champion_pointer(store, base, by="ann")
    champion.promote_champion(store, first, over=base.sha256, by="ann", reason="won")
    second = published(store, tmp_path, 2.0, over=first)
    start_rollout(store, second, DeployConfig(), target="local", service=None, by="ann")
    stray = published(store, tmp_path, 3.0, over=base, verdict="keep")
    planned = prune_checkpoints(store, LINE, keep=0, really=False)
    assert planned.gone == (stray.sha256,)
    assert len(list_published_digests(store, LINE)) == 4
    done = prune_checkpoints(store, LINE, keep=0, really=True)
    assert done.kept[first.sha256] == "the champion pointer"
    assert done.kept[base.sha256] == "the champion's history"
    assert done.kept[second.sha256] == "rollout 1"
    assert list_published_digests(store, LINE) == sorted([base.sha256, first.sha256, second.sha256])
    assert list(store.keys(f"models/{LINE}/{stray.sha256}/")) == []


def test_a_kept_decision_keeps_its_champion(tmp_path: Path) -> None:
    """Without pointer and rollouts, the newest is kept, and with it the champion that its decision names."""
    store = FolderStore(tmp_path / "store")
    base = published(store, tmp_path, 0.0)
    newest = published(store, tmp_path, 1.0, over=base)
    done = prune_checkpoints(store, LINE, keep=1, really=True)
    assert done.gone == ()
    assert done.kept == {base.sha256: newest.decision.id, newest.sha256: "one of the newest"}  # type: ignore[union-attr]
    assert prune_checkpoints(store, LINE, keep=0, really=True).gone == (base.sha256, newest.sha256)
    with pytest.raises(ValueError, match="must not be negative"):
        prune_checkpoints(store, LINE, keep=-1, really=True)


def test_unfinished_publications_are_removed_on_demand(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    whole = published(store, tmp_path, 0.0)
    store.write_new(f"models/{LINE}/{'ab' * 32}/config.json", b"{}")
    assert prune_unfinished(store, LINE, really=False) == ("ab" * 32,)
    assert prune_unfinished(store, LINE, really=True) == ("ab" * 32,)
    assert prune_unfinished(store, LINE, really=False) == ()
    assert list_published_digests(store, LINE) == [whole.sha256]
