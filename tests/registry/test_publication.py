"""Publication: files are verified and never overwritten, and the manifest is written last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clincot.config import PublishConfig
from clincot.jsonl import hash_files
from clincot.models.checkpoint import UnsupportedCheckpoint, hash_checkpoint
from clincot.records import BenchmarkReport, Interval
from clincot.registry import publication as publishing
from clincot.registry.manifest import (
    CorruptCheckpoint,
    NotPublished,
    build_checkpoint_key,
    download_checkpoint,
    find_manifest,
    iter_manifests,
    list_published_digests,
    read_manifest,
    verify_checkpoint,
)
from clincot.registry.publication import AlreadyPublished, PublicationEvidence, register_checkpoint
from clincot.storage.folder_store import FolderStore
from clincot.storage.store import Store
from tests.support.deployment_builders import LINE, decided, golden, published, write_checkpoint

CONFIG = PublishConfig(name=LINE)


def test_a_published_checkpoint_downloads_unchanged(store: Store, tmp_path: Path) -> None:
    base = published(store, tmp_path, 1.0)
    manifest = published(store, tmp_path, 2.0, over=base)
    assert (base.round, manifest.round, manifest.parent) == (0, 1, base.sha256)
    assert manifest.uri == f"{store.url}/models/chest/{manifest.sha256}"
    names = [file.path for file in manifest.files]
    assert names == sorted(
        ["README.md", "config.json", "model.safetensors", "train_log.json", *(g.image for g in manifest.golden)]
    )
    assert list(iter_manifests(store, LINE)) == [base, manifest]
    folder = download_checkpoint(store, manifest, tmp_path / "fetched")
    assert hash_checkpoint(folder) == manifest.sha256
    assert hash_files(folder / manifest.golden[0].image) == manifest.golden[0].sha256
    assert find_manifest(store, LINE, manifest.sha256[:8]) == manifest


def test_publishing_again_is_idempotent_for_the_same_evidence(store: Store, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    first = register_checkpoint(store, checkpoint, CONFIG, PublicationEvidence())
    again = register_checkpoint(store, checkpoint, CONFIG, PublicationEvidence(git="another commit"))
    assert again == first
    images = tmp_path / "g"
    decision = decided("0" * 64, first.sha256)
    other = PublicationEvidence(decision=decision, golden=golden(images), images=images)
    with pytest.raises(AlreadyPublished, match="with another decision, golden, files"):
        register_checkpoint(store, checkpoint, CONFIG, other)
    assert read_manifest(store, LINE, first.sha256) == first


def test_an_interrupted_publication_is_completed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies while it verifies the upload; the next one keeps the files and writes the manifest."""
    store = FolderStore(tmp_path / "store")
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "verify_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            register_checkpoint(store, checkpoint, CONFIG, PublicationEvidence())
    digest = hash_checkpoint(checkpoint)
    assert list_published_digests(store, LINE) == []
    with pytest.raises(NotPublished):
        read_manifest(store, LINE, digest)
    weights = store.root / build_checkpoint_key(LINE, digest) / "model.safetensors"
    before = weights.stat().st_ino
    register_checkpoint(store, checkpoint, CONFIG, PublicationEvidence())
    assert list_published_digests(store, LINE) == [digest]
    assert weights.stat().st_ino == before


def test_a_different_uploaded_file_stops_the_publication(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    digest = hash_checkpoint(checkpoint)
    store.write_new(f"{build_checkpoint_key(LINE, digest)}/config.json", b"left by another publication")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json: an unfinished publication left another file"):
        register_checkpoint(store, checkpoint, CONFIG, PublicationEvidence())
    assert list_published_digests(store, LINE) == []


def test_a_damaged_published_file_is_named(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = register_checkpoint(store, write_checkpoint(tmp_path / "c", 1.0), CONFIG, PublicationEvidence())
    path = store.root / build_checkpoint_key(LINE, manifest.sha256) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: has sha256"):
        verify_checkpoint(store, manifest)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: downloaded with sha256"):
        download_checkpoint(store, manifest, tmp_path / "fetched")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.pt", "x.pkl"])
def test_pickled_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    (checkpoint / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedCheckpoint, match=rf"{name} is pickled"):
        register_checkpoint(FolderStore(tmp_path / "store"), checkpoint, CONFIG, PublicationEvidence())


def test_a_missing_shard_and_a_stray_file_are_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    (checkpoint / "notes.md").write_text("mine")
    with pytest.raises(UnsupportedCheckpoint, match=r"notes\.md belongs to no checkpoint"):
        register_checkpoint(FolderStore(tmp_path / "store"), checkpoint, CONFIG, PublicationEvidence())
    (checkpoint / "notes.md").unlink()
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedCheckpoint, match=r"lists model-00001-of-00002\.safetensors, which is not"):
        register_checkpoint(FolderStore(tmp_path / "store"), checkpoint, CONFIG, PublicationEvidence())


def test_an_adapter_is_published_on_its_base(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    base = published(store, tmp_path, 1.0)
    merged = write_checkpoint(tmp_path / "c", 2.0, parent=base.sha256)
    keep = PublishConfig(name=LINE, adapter="keep")
    with pytest.raises(UnsupportedCheckpoint, match=r"no adapter/adapter_config\.json to keep"):
        register_checkpoint(store, merged, keep, PublicationEvidence())
    (merged / "adapter").mkdir()
    (merged / "adapter" / "adapter_config.json").write_text("{}")
    (merged / "adapter" / "adapter_model.safetensors").write_bytes((merged / "model.safetensors").read_bytes())
    manifest = register_checkpoint(
        store, merged, keep, PublicationEvidence(decision=decided(base.sha256, hash_checkpoint(merged)))
    )
    assert (manifest.kind, manifest.base, manifest.measured) == ("adapter", base.sha256, hash_checkpoint(merged))
    assert manifest.sha256 != manifest.measured
    assert [f.path for f in manifest.files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_the_round_is_inherited_or_configured(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    orphan = write_checkpoint(tmp_path / "c", 2.0, parent="ab" * 32)
    with pytest.raises(ValueError, match="its parent abababababab is not published; set --round"):
        register_checkpoint(store, orphan, CONFIG, PublicationEvidence())
    assert register_checkpoint(store, orphan, CONFIG.model_copy(update={"round": 3}), PublicationEvidence()).round == 3


def test_evidence_about_another_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    with pytest.raises(ValueError, match="the decision is about"):
        register_checkpoint(
            FolderStore(tmp_path / "s"), checkpoint, CONFIG, PublicationEvidence(decision=decided("0" * 64, "1" * 64))
        )
    report = BenchmarkReport(benchmark="b", policy="another", protocol="strict", metrics={})
    with pytest.raises(ValueError, match="the report is about another"):
        register_checkpoint(FolderStore(tmp_path / "s"), checkpoint, CONFIG, PublicationEvidence(report=report))


def test_the_model_card_states_metrics_and_limits(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    digest = hash_checkpoint(checkpoint)
    accuracy = Interval(value=0.7123, low=0.65, high=0.77, n=198, n_unscored=2, clusters=24)
    report = BenchmarkReport(
        benchmark="bench", policy=digest, protocol="strict", metrics={"written": {"accuracy": accuracy}}
    )
    manifest = register_checkpoint(
        store,
        checkpoint,
        CONFIG,
        PublicationEvidence(report=report, decision=decided("0" * 64, digest), agreement=0.61),
    )
    card = store.read(f"{build_checkpoint_key(LINE, manifest.sha256)}/README.md").content.decode()
    assert "| own region | 198 + 2 unscored | 0.712 [0.650, 0.770] |" in card
    assert "**promote**" in card
    assert "0.100 [0.020, 0.180]" in card
    assert "Not a medical\ndevice" in card
    assert "Krippendorff's α 0.610" in card
