"""Checkpoints that are refused before they are loaded, and checkpoints from S3."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from clincot.cli.app import main
from clincot.jsonl import hash_files
from clincot.models.checkpoint import UnsupportedCheckpoint, hash_checkpoint
from clincot.serving.backend import (
    check_checkpoint_files,
    load_served_prompt_format,
    open_checkpoint_folder,
    read_published_digest,
)
from clincot.serving.request_context import RequestContext
from clincot.serving.server import ServePlan, open_backend
from clincot.storage.open import open_store
from clincot.storage.store import StoreFailed
from tests.support import tiny
from tests.support.s3_server import S3Server


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A complete checkpoint with a manifest and weights in two shards."""
    folder = tiny.write_model(tmp_path / "policy", seed=0)
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    placed = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    files = [{"path": p.name, "sha256": hash_files(p), "size": p.stat().st_size} for p in sorted(folder.iterdir())]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def flip(path: Path) -> None:
    """Flip one bit of the last weight, leaving the file's size and header unchanged."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


SHARD = "model-00002-of-00002.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed weight": (lambda f: flip(f / SHARD), SHARD),
    "a changed configuration": (lambda f: (f / "config.json").write_text("{}"), "config.json"),
    "a missing shard": (lambda f: (f / SHARD).unlink(), SHARD),
    "a missing tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "half a shard": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-100]), SHARD),
    "a shard that is none": (lambda f: (f / SHARD).write_bytes(b"<html>not found</html>"), SHARD),
    "a shard more": (lambda f: shutil.copy(f / SHARD, f / "extra.safetensors"), "extra.safetensors"),
    "pickled weights": (lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps({})), "pytorch_model.bin"),
    "a pickle by another name": (lambda f: (f / "notes.dat").write_bytes(pickle.dumps({"a": 1})), "notes.dat"),
    "a manifest that is none": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json"),
}


def test_a_complete_checkpoint_is_accepted(checkpoint: Path) -> None:
    check_checkpoint_files(checkpoint)


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_file_name(checkpoint: Path, what: str) -> None:
    damage, named = DAMAGES[what]
    damage(checkpoint)
    with pytest.raises(UnsupportedCheckpoint, match=named.replace(".", r"\.")):
        check_checkpoint_files(checkpoint)


@pytest.mark.parametrize("what", ["a changed weight", "a missing shard", "pickled weights"])
def test_the_server_does_not_start_with_a_damaged_checkpoint(
    checkpoint: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, named = DAMAGES[what]
    damage(checkpoint)
    assert main(["serve", "--checkpoint", str(checkpoint)]) == 1
    said = capsys.readouterr().err
    assert named in said
    assert "Traceback" not in said


def test_a_truncated_shard_is_found_without_a_manifest(checkpoint: Path) -> None:
    """Without a manifest a changed weight is not detected, but a truncated file is."""
    (checkpoint / "manifest.json").unlink()
    flip(checkpoint / SHARD)
    check_checkpoint_files(checkpoint)
    (checkpoint / SHARD).write_bytes((checkpoint / SHARD).read_bytes()[:-1])
    with pytest.raises(UnsupportedCheckpoint, match="cut off"):
        check_checkpoint_files(checkpoint)


def test_a_transformer_downloads_no_weights(checkpoint: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3.bucket("served")
    store = open_store("s3://served/models/nodules")
    for path in checkpoint.iterdir():
        store.upload(f"0a1b/{path.name}", path)
    address = "s3://served/models/nodules/0a1b"
    with open_checkpoint_folder(address) as folder:
        check_checkpoint_files(folder)
        assert {p.name: hash_files(p) for p in folder.iterdir()} == {
            p.name: hash_files(p) for p in checkpoint.iterdir()
        }
    assert not folder.exists()
    with open_checkpoint_folder(address, views_only=True) as folder:
        assert list(folder.glob("*.safetensors*")) == []
        assert load_served_prompt_format(folder) == load_served_prompt_format(checkpoint)
        assert read_published_digest(folder) == hash_checkpoint(checkpoint)
    with pytest.raises(UnsupportedCheckpoint, match="nothing is stored"), open_checkpoint_folder(address + "ff"):
        pass
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreFailed), open_checkpoint_folder(address):
        pass


def test_answers_from_a_predictor_name_the_published_checkpoint(checkpoint: Path) -> None:
    """As answers of a model in this process do. The transformer has the manifest, and need not have the weights."""
    digest = hash_checkpoint(checkpoint)
    for shard in checkpoint.glob("*.safetensors"):
        shard.unlink()
    plan = ServePlan(str(checkpoint), predictor_host="127.0.0.1:9")
    with contextlib.closing(open_backend(plan, checkpoint)) as backend:
        assert backend.digest == digest
        with backend.open_policy(RequestContext(60)) as policy:
            assert policy.digest == digest


def test_a_changed_prompt_format_is_refused(checkpoint: Path) -> None:
    (checkpoint / "clincot.json").write_text("{}")
    with pytest.raises(UnsupportedCheckpoint, match=r"clincot\.json"):
        load_served_prompt_format(checkpoint)
