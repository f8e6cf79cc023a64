"""Load policies and judges from a folder, a hub name or an endpoint's URL."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from clincot.config import JudgeSpec
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.endpoint import build_endpoint_judge
from clincot.models.protocols import Judge
from clincot.models.vlm import VisionLanguageModel


def load_policy(path: Path | str) -> VisionLanguageModel:
    """Load the policy of a checkpoint folder; the last few models stay in memory until `unload_models` is called."""
    return _load_model(str(path), "")


def load_judge(spec: JudgeSpec) -> Judge:
    """Load a judge: an endpoint if `url` is set, otherwise a checkpoint in this process."""
    if spec.url:
        return build_endpoint_judge(spec)
    model = _load_model(spec.checkpoint, spec.name)
    _ = model.yes_no_ids  # raises for a tokenizer without yes and no
    return model


def check_checkpoint_exists(path: str, *, what: str) -> None:
    """Raise UnsupportedCheckpoint, naming `what`, unless the folder or hub name has a checkpoint.

    The weights are not read.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path(path)
    if folder.exists():
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise UnsupportedCheckpoint(
                f"{what}: {path} holds no checkpoint (config.json and *.safetensors)",
                f"`clincot doctor {path}` says what is missing",
            )
        return
    try:
        hf_hub_download(path, "config.json")  # a few hundred bytes, or from the cache
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedCheckpoint(
            f"{what}: {path} does not exist, and as the name of a checkpoint on the hub it cannot be loaded: {reason}"
        ) from error


def unload_models() -> None:
    """Unload all models, so that training can use the memory."""
    _load_model.cache_clear()


@lru_cache(maxsize=4)
def _load_model(path: str, name: str) -> VisionLanguageModel:
    return VisionLanguageModel(path, name=name, device=_pick_device(), dtype=os.environ.get("CLINCOT_DTYPE", "float32"))


def _pick_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
