"""A checkpoint folder as files: what its digest covers, and what may not lie in it. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from clincot.errors import InvalidInput
from clincot.jsonl import hash_files

WEIGHTS_INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"  # of a published checkpoint
METADATA_FILES = frozenset(
    {"record.json", "train_log.json", MANIFEST}
)  # told about a checkpoint, without a say in its answers
_DIGESTED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})  # loading one runs what is in it


class UnsupportedCheckpoint(InvalidInput):
    """The checkpoint cannot be used here; says why and what would mend it."""


def hash_checkpoint(path: Path) -> str:
    """sha256 over names and bytes of everything that decides what a checkpoint says."""
    names = list_digested_files(path)
    if not any(n.endswith(".safetensors") for n in names):
        raise UnsupportedCheckpoint(f"{path}: no *.safetensors in this folder; pickled weights are not read")
    return hash_checkpoint_files({name: hash_files(path / name) for name in names})


def hash_checkpoint_files(sha256: Mapping[str, str]) -> str:
    """checkpoint_digest of a folder whose files, by their paths in it, have these digests."""
    total = hashlib.sha256()
    for name in sorted(filter(_is_digested, sha256)):
        total.update(f"{name}:{sha256[name]}\n".encode())
    return total.hexdigest()


def list_digested_files(path: Path) -> list[str]:
    """Names of the files that the digest covers, sorted."""
    return sorted(p.name for p in path.iterdir() if _is_digested(p.name) and p.is_file())


def _is_digested(name: str) -> bool:
    return "/" not in name and Path(name).suffix in _DIGESTED_SUFFIXES and name not in METADATA_FILES


def check_weight_files(path: Path) -> None:
    """Raise UnsupportedCheckpoint, naming the file, where a shard is missing or pickled weights lie in the folder."""
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if pickled:
        raise UnsupportedCheckpoint(f"{path}: {', '.join(pickled)} is pickled; expected safetensors alone")
    index = path / WEIGHTS_INDEX
    if not index.is_file():
        return
    shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    missing = sorted(shard for shard in shards if not (path / shard).is_file())
    if missing:
        raise UnsupportedCheckpoint(f"{path}: {WEIGHTS_INDEX} names {', '.join(missing)}, which is not in the folder")


def check_weight_headers(folder: Path) -> None:
    """Raise UnsupportedCheckpoint naming the file whose header is damaged, or that was cut off."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise UnsupportedCheckpoint(f"{path}: not a whole safetensors file: {error}") from None
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedCheckpoint(f"{folder / 'config.json'}: not JSON: {error}") from None
