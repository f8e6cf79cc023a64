"""A published checkpoint in Kubeflow's Model Registry: version, artifact, champion, and a registry that is away."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.clients.http import HttpFailure
from clincot.config import PublishConfig
from clincot.registry.champion import create_champion_pointer, promote_champion
from clincot.registry.golden import AnswerFn, publish_checkpoint
from clincot.registry.model_registry import TOKEN_ENV, ModelRegistry, follow_champion, register_externally
from clincot.storage.folder_store import FolderStore
from clincot.storage.store import Store
from tests.support.deployment_builders import LINE, published, write_checkpoint
from tests.support.http_server import serving
from tests.support.model_registry_server import RegistryStandIn


def test_checkpoints_are_versions_of_their_line_and_the_champion_is_named(store: Store, tmp_path: Path) -> None:
    base = published(store, tmp_path, 1.0)
    manifest = published(store, tmp_path, 2.0, over=base)
    create_champion_pointer(store, base, by="test")
    registry = RegistryStandIn()
    with serving(registry.reply) as server:
        register_externally(server.url, store, base)
        register_externally(server.url, store, manifest)
        (model,) = registry.resources["registered_model"]
        assert model["name"] == LINE
        assert model["customProperties"]["champion"]["string_value"] == base.sha256
        promote_champion(store, manifest, over=base.sha256, by="test", reason="better")
        register_externally(server.url, store, manifest)  # what a retried task does
    versions = registry.resources["model_version"]
    assert [version["name"] for version in versions] == [base.sha256, manifest.sha256]
    assert [artifact["uri"] for artifact in registry.resources["artifact"]] == [base.uri, manifest.uri]
    assert model["customProperties"]["champion"]["string_value"] == manifest.sha256
    properties = versions[1]["customProperties"]
    assert properties["round"]["int_value"] == "1"
    assert properties["verdict"]["string_value"] == "promote"
    assert properties["gain"]["double_value"] == 0.1
    assert properties["parent"]["string_value"] == base.sha256
    assert registry.created == 5  # one line, two versions, two artifacts


def test_other_properties_of_a_line_stay(store: Store, tmp_path: Path) -> None:
    manifest = published(store, tmp_path, 1.0)
    registry = RegistryStandIn()
    with serving(registry.reply) as server:
        register_externally(server.url, store, manifest)
        owner = {"metadataType": "MetadataStringValue", "string_value": "radiology"}
        registry.resources["registered_model"][0]["customProperties"] = {"team": owner}
        assert follow_champion(server.url, manifest) == ""
    assert registry.resources["registered_model"][0]["customProperties"]["team"] == owner
    assert "champion" in registry.resources["registered_model"][0]["customProperties"]


def answer_nothing(*_: object) -> AnswerFn:
    raise AssertionError("there are no golden questions to answer")


def test_publishing_registers_after_the_store_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wrong token the task fails, the checkpoint is published, and a retry with the right one registers it."""
    store, checkpoint = FolderStore(tmp_path / "store"), write_checkpoint(tmp_path / "c", 1.0)
    registry = RegistryStandIn(token="right")
    with serving(registry.reply) as server:
        config = PublishConfig(store=str(store.root), name=LINE, model_registry=server.url)

        def publish() -> str:
            return publish_checkpoint(config, {"checkpoint": checkpoint}, load_look=answer_nothing).sha256

        monkeypatch.setenv(TOKEN_ENV, "wrong")
        with pytest.raises(HttpFailure, match="the key sent was not accepted"):
            publish()
        monkeypatch.setenv(TOKEN_ENV, "right")
        digest = publish()
    assert [version["name"] for version in registry.resources["model_version"]] == [digest]


def test_a_registry_that_is_away_does_not_fail_a_rollout(store: Store, tmp_path: Path) -> None:
    manifest = published(store, tmp_path, 1.0)
    assert "Connect" in follow_champion("http://127.0.0.1:9", manifest)
    with pytest.raises(HttpFailure), ModelRegistry("http://127.0.0.1:9") as registry:
        registry.register_manifest(manifest)
