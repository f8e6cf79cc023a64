"""The files of a checkpoint folder: which of them the digest covers, and which are refused. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from clincot.errors import InvalidInput
from clincot.jsonl import hash_files, write_json

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
MERGE_REMEDY = "merge it first (peft: merge_and_unload) or give the merged checkpoint"
WEIGHTS_INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"  # of a published checkpoint
# These files describe a checkpoint without affecting its answers, so the digest does not cover them.
METADATA_FILES = frozenset({"record.json", "train_log.json", "train_settings.json", MANIFEST})
_LOADING_OPTIONS = frozenset({"is_local", "local_files_only"})  # of a tokenizer; they do not affect what it does
_DIGESTED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})  # loading one executes its content


class UnsupportedCheckpoint(InvalidInput):
    """The checkpoint cannot be used here: what is wrong, and what to do about it.

    The message is both in one sentence; `problem` and `remedy` are its parts. `remedy` is empty where the message does
    not separate them.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy


def save_processor(processor: Any, folder: Path) -> None:
    """Write a processor's files with the same bytes wherever it was loaded from.

    transformers (5.19.0, tokenization_utils_base.py) also writes with which options it was loaded, of
    which `local_files_only` depends on the environment variable HF_HUB_OFFLINE. The digest covers these bytes.
    """
    processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {name: value for name, value in content.items() if name not in _LOADING_OPTIONS})


def hash_checkpoint(path: Path) -> str:
    """sha256 over the names and bytes of all files that affect a checkpoint's answers.

    Raises UnsupportedCheckpoint for a folder without safetensors.
    """
    names = list_digested_files(path)
    if not any(name.endswith(".safetensors") for name in names):
        raise UnsupportedCheckpoint(f"{path}: no *.safetensors in this folder; pickled weights are not read")
    return hash_checkpoint_files({name: hash_files(path / name) for name in names})


def hash_checkpoint_files(sha256: Mapping[str, str]) -> str:
    """The digest of a checkpoint (see hash_checkpoint), given the digest of each file by its path in the folder."""
    total = hashlib.sha256()
    for name in sorted(filter(_is_digested, sha256)):
        total.update(f"{name}:{sha256[name]}\n".encode())
    return total.hexdigest()


def list_digested_files(path: Path) -> list[str]:
    """The names of the files that the digest covers, sorted."""
    return sorted(file.name for file in path.iterdir() if _is_digested(file.name) and file.is_file())


def _is_digested(name: str) -> bool:
    return "/" not in name and Path(name).suffix in _DIGESTED_SUFFIXES and name not in METADATA_FILES


def check_weight_files(path: Path) -> None:
    """Raise UnsupportedCheckpoint, naming the file, if a shard is missing or the folder contains pickled weights."""
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickled:
        raise UnsupportedCheckpoint(
            f"{path}: {', '.join(pickled)} is pickled and would execute code when it is loaded",
            "save the weights as safetensors (model.save_pretrained) and delete this file",
        )
    index = path / WEIGHTS_INDEX
    if not index.is_file():
        return
    shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    missing = sorted(shard for shard in shards if not (path / shard).is_file())
    if missing:
        raise UnsupportedCheckpoint(f"{path}: {WEIGHTS_INDEX} lists {', '.join(missing)}, which is not in the folder")


def check_no_adapter(path: Path) -> None:
    """Raise UnsupportedCheckpoint for a folder with a PEFT adapter, also where full weights lie next to it.

    transformers would put the adapter onto the weights, or onto those of another folder that adapter_config.json names.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        return
    weights = sorted(file.name for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))
    problem = "a PEFT adapter beside full weights" if weights else "a PEFT adapter without the model's weights"
    raise UnsupportedCheckpoint(f"{path}: holds {ADAPTER_CONFIG}, {problem}", MERGE_REMEDY)


def check_weight_headers(folder: Path) -> None:
    """Raise UnsupportedCheckpoint, naming the file, if a safetensors header is damaged or a file is truncated."""
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
