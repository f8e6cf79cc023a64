"""Files of a checkpoint folder: JSON, and the headers of its safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from clincot.models.checkpoint import WEIGHTS_INDEX, UnsupportedCheckpoint

_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to copy: where it is, and its new name. Sizes are those of the source."""

    file: Path
    key: str
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path) -> list[PlannedTensor]:
    """Every tensor of a folder's safetensors under its own name, file by file."""
    found = []
    for path in list_weights(folder):
        try:
            with safe_open(path, framework="pt") as weights:
                for key in sorted(weights.keys()):
                    header = weights.get_slice(key)
                    found.append(PlannedTensor(path, key, key, tuple(header.get_shape()), header.get_dtype()))
        except SafetensorError as error:
            raise UnsupportedCheckpoint(f"{path}: not a whole safetensors file: {error}") from None
    return found


def list_weights(folder: Path) -> list[Path]:
    """The weight files: those that the index names, or all *.safetensors. A pickle is never read."""
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        paths = sorted({folder / name for name in read_json_object(index).get("weight_map", {}).values()})
        if missing := [path.name for path in paths if not path.is_file()]:
            raise UnsupportedCheckpoint(f"{folder}: {WEIGHTS_INDEX} lists {list_some(missing)}, not in the folder")
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if paths:
        return paths
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickled:
        raise UnsupportedCheckpoint(
            f"{folder}: {list_some(pickled)} is pickled, and loading a pickle runs code from it; save the model as "
            "safetensors first (save_pretrained of transformers does)"
        )
    raise UnsupportedCheckpoint(f"{folder}: no *.safetensors in this folder")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UnsupportedCheckpoint, naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedCheckpoint(f"{path}: no such file") from None
    except ValueError as error:
        raise UnsupportedCheckpoint(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UnsupportedCheckpoint(f"{path}: expected a JSON object")
    return content


def count_bytes(planned: PlannedTensor) -> int:
    """Size of the tensor in its source."""
    return math.prod(planned.shape) * _DTYPE_BYTES.get(planned.dtype, 1)


def list_some(names: Iterable[str], most: int = 5) -> str:
    """The first names for a message, and how many follow."""
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
