"""Compares the names and shapes in the safetensors headers with the model that config.json describes.

Only headers are read and the model is built on the meta device, so a checkpoint of any size takes about a second.
transformers itself maps the stored names to those of the model, as it does when it loads the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from clincot.models.checkpoint import MERGE_REMEDY, UnsupportedCheckpoint

WEIGHTS_REMEDY = "copy config.json and all *.safetensors from the same published checkpoint"

# what transformers raises for files that do not fit together, or for a package that is missing
LOADING_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


def check_weight_shapes(path: Path, config: Any, auto_class: Any) -> int:
    """The number of tensors in the headers, all of which the model needs in this shape.

    auto_class: the class with which the weights are loaded, such as AutoModelForCausalLM. Raises UnsupportedCheckpoint,
    naming a tensor, if one is missing or has another shape.
    """
    headers = _read_headers(path)
    model_class = auto_class._model_mapping[type(config)]
    if model_class.config_class is config.sub_configs.get("text_config"):  # the language model of a larger one
        config = config.get_text_config()
    try:
        _, loading = model_class.from_pretrained(
            None,
            config=config,
            state_dict=headers,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # reported instead of raised
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        raise UnsupportedCheckpoint(
            f"{path}: the tensors do not fit into {model_class.__name__}: {type(error).__name__}: {error}",
            WEIGHTS_REMEDY,
        ) from error
    refuse_incomplete_weights(path, loading)
    return len(headers)


def refuse_incomplete_weights(path: str | Path, loading: dict[str, Any]) -> None:
    """Raise UnsupportedCheckpoint if transformers reports tensors that it fills with random numbers.

    loading: the loading info of from_pretrained.
    """
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UnsupportedCheckpoint(
            f"{path}: its safetensors lack {len(missing)} tensors of the model, such as {missing[0]}", WEIGHTS_REMEDY
        )
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise UnsupportedCheckpoint(
            f"{path}: {len(mismatched)} tensors have another shape than config.json says, such as {name}: expected "
            f"{tuple(expected)}, got {tuple(stored)}",
            WEIGHTS_REMEDY,
        )


def refuse_loaded_adapter(path: str | Path, model: Any) -> None:
    """Raise UnsupportedCheckpoint if transformers has put an adapter onto the weights (a repository on the hub)."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedCheckpoint(f"{path}: has a PEFT adapter (adapter_config.json)", MERGE_REMEDY)


def _read_headers(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder by name, as a meta tensor of its shape."""
    headers = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                headers[name] = torch.empty(tensors.get_slice(name).get_shape(), device="meta")
    return headers
