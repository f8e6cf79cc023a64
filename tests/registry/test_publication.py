"""Publishing: everything checked, nothing overwritten, the manifest last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clincot.config import PublishSection
from clincot.jsonl import file_digest
from clincot.models.checkpoint import UnsupportedCheckpoint, checkpoint_digest
from clincot.records import BenchmarkReport, Interval
from clincot.registry import publication as publishing
from clincot.registry.manifest import (
    Corrupt,
    NotPublished,
    fetch,
    find_manifest,
    folder_of,
    manifests,
    published_digests,
    read_manifest,
    verify,
)
from clincot.registry.publication import AlreadyPublished, Evidence, publish
from clincot.storage.folder_store import FolderStore
from clincot.storage.store import Store
from tests.support.deployment_builders import LINE, decided, golden, published, write_checkpoint

SECTION = PublishSection(name=LINE)


def test_what_is_published_comes_back_whole(store: Store, tmp_path: Path) -> None:
    base = published(store, tmp_path, 1.0)
    manifest = published(store, tmp_path, 2.0, over=base)
    assert (base.round, manifest.round, manifest.parent) == (0, 1, base.sha256)
    assert manifest.uri == f"{store.url}/models/chest/{manifest.sha256}"
    names = [file.path for file in manifest.files]
    assert names == sorted(
        ["README.md", "config.json", "model.safetensors", "train_log.json", *(g.image for g in manifest.golden)]
    )
    assert list(manifests(store, LINE)) == [base, manifest]
    folder = fetch(store, manifest, tmp_path / "fetched")
    assert checkpoint_digest(folder) == manifest.sha256
    assert file_digest(folder / manifest.golden[0].image) == manifest.golden[0].sha256
    assert find_manifest(store, LINE, manifest.sha256[:8]) == manifest


def test_publishing_again_changes_nothing_and_other_evidence_is_refused(store: Store, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    first = publish(store, checkpoint, SECTION, Evidence())
    again = publish(store, checkpoint, SECTION, Evidence(git="another commit"))
    assert again == first
    images = tmp_path / "g"
    decision = decided("0" * 64, first.sha256)
    other = Evidence(decision=decision, golden=golden(images), images=images)
    with pytest.raises(AlreadyPublished, match="with another decision, golden, files"):
        publish(store, checkpoint, SECTION, other)
    assert read_manifest(store, LINE, first.sha256) == first


def test_half_a_publication_does_not_exist_and_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies when it reads back what it sent; the next one keeps the files and writes the manifest."""
    store = FolderStore(tmp_path / "store")
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "verify", die)
        with pytest.raises(KeyboardInterrupt):
            publish(store, checkpoint, SECTION, Evidence())
    digest = checkpoint_digest(checkpoint)
    assert published_digests(store, LINE) == []
    with pytest.raises(NotPublished):
        read_manifest(store, LINE, digest)
    weights = store.root / folder_of(LINE, digest) / "model.safetensors"
    before = weights.stat().st_ino
    publish(store, checkpoint, SECTION, Evidence())
    assert published_digests(store, LINE) == [digest]
    assert weights.stat().st_ino == before


def test_a_file_that_changed_on_the_way_is_named_and_nothing_appears(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    digest = checkpoint_digest(checkpoint)
    store.write_new(f"{folder_of(LINE, digest)}/config.json", b"left by another publication")
    with pytest.raises(Corrupt, match=r"config\.json: an unfinished publication left another file"):
        publish(store, checkpoint, SECTION, Evidence())
    assert published_digests(store, LINE) == []


def test_a_published_file_that_rots_is_named(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = publish(store, write_checkpoint(tmp_path / "c", 1.0), SECTION, Evidence())
    path = store.root / folder_of(LINE, manifest.sha256) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(Corrupt, match=r"model\.safetensors: has sha256"):
        verify(store, manifest)
    with pytest.raises(Corrupt, match=r"model\.safetensors came with sha256"):
        fetch(store, manifest, tmp_path / "fetched")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.pt", "x.pkl"])
def test_pickled_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    (checkpoint / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedCheckpoint, match=rf"{name} is pickled"):
        publish(FolderStore(tmp_path / "store"), checkpoint, SECTION, Evidence())


def test_a_missing_shard_and_a_stray_file_are_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    (checkpoint / "notes.md").write_text("mine")
    with pytest.raises(UnsupportedCheckpoint, match=r"notes\.md belongs to no checkpoint"):
        publish(FolderStore(tmp_path / "store"), checkpoint, SECTION, Evidence())
    (checkpoint / "notes.md").unlink()
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedCheckpoint, match=r"names model-00001-of-00002\.safetensors, which is not"):
        publish(FolderStore(tmp_path / "store"), checkpoint, SECTION, Evidence())


def test_the_adapter_alone_is_published_on_its_base(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    base = published(store, tmp_path, 1.0)
    merged = write_checkpoint(tmp_path / "c", 2.0, parent=base.sha256)
    keep = PublishSection(name=LINE, adapter="keep")
    with pytest.raises(UnsupportedCheckpoint, match=r"no adapter/adapter_config\.json to keep"):
        publish(store, merged, keep, Evidence())
    (merged / "adapter").mkdir()
    (merged / "adapter" / "adapter_config.json").write_text("{}")
    (merged / "adapter" / "adapter_model.safetensors").write_bytes((merged / "model.safetensors").read_bytes())
    manifest = publish(store, merged, keep, Evidence(decision=decided(base.sha256, checkpoint_digest(merged))))
    assert (manifest.kind, manifest.base, manifest.measured) == ("adapter", base.sha256, checkpoint_digest(merged))
    assert manifest.sha256 != manifest.measured
    assert [f.path for f in manifest.files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_the_round_is_recorded_inherited_or_asked_for(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    orphan = write_checkpoint(tmp_path / "c", 2.0, parent="ab" * 32)
    with pytest.raises(ValueError, match="its parent abababababab is not published; say --round"):
        publish(store, orphan, SECTION, Evidence())
    assert publish(store, orphan, SECTION.model_copy(update={"round": 3}), Evidence()).round == 3


def test_evidence_about_another_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    with pytest.raises(ValueError, match="the decision is about"):
        publish(FolderStore(tmp_path / "s"), checkpoint, SECTION, Evidence(decision=decided("0" * 64, "1" * 64)))
    report = BenchmarkReport(benchmark="b", policy="another", protocol="strict", metrics={})
    with pytest.raises(ValueError, match="the report is of another"):
        publish(FolderStore(tmp_path / "s"), checkpoint, SECTION, Evidence(report=report))


def test_the_card_says_what_was_measured_and_what_it_is_not_for(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    digest = checkpoint_digest(checkpoint)
    accuracy = Interval(value=0.7123, low=0.65, high=0.77, n=198, n_unscored=2, clusters=24)
    report = BenchmarkReport(
        benchmark="bench", policy=digest, protocol="strict", metrics={"written": {"accuracy": accuracy}}
    )
    manifest = publish(
        store, checkpoint, SECTION, Evidence(report=report, decision=decided("0" * 64, digest), agreement=0.61)
    )
    card = store.read(f"{folder_of(LINE, manifest.sha256)}/README.md").content.decode()
    assert "| own region | 198 + 2 unscored | 0.712 [0.650, 0.770] |" in card
    assert "**promote**" in card
    assert "0.100 [0.020, 0.180]" in card
    assert "Not a medical\ndevice" in card
    assert "Krippendorff's α 0.610" in card
