"""The target of a rollout by its kind and options."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.targets.local import LocalTarget
from clincot.deployment.unattended import TargetOptions, build_target
from clincot.errors import InvalidInput
from clincot.storage.folder_store import FolderStore
from tests.support.deployment_builders import published


def test_a_local_target_uses_the_local_options(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = published(store, tmp_path, 1.0)
    options = TargetOptions(state=tmp_path / "state", serve_command=("serve", "{checkpoint}"), port=8123)
    target = build_target(store, manifest, "local", steps=(50, 100), options=options)
    assert isinstance(target, LocalTarget)
    assert (target.state, target.command, target.port) == (tmp_path / "state", ("serve", "{checkpoint}"), 8123)
    assert target.steps == (100,)  # no other server shares the traffic
    assert not target.state.exists()  # nothing was started


def test_a_kserve_target_needs_settings_and_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = published(store, tmp_path, 1.0)
    with pytest.raises(InvalidInput, match="needs the settings of its service"):
        build_target(store, manifest, "kserve", steps=(100,), options=TargetOptions())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    from clincot.clients.kubernetes import ClusterFailed

    with pytest.raises(ClusterFailed):
        build_target(store, manifest, "kserve", steps=(100,), options=TargetOptions(service=ServiceSettings()))
