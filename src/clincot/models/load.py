"""Load policies and judges from a folder, a hub name or an endpoint's URL.

torch and transformers are imported with the first model of this process: a panel of endpoints needs neither.
"""

from __future__ import annotations

import gc
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from clincot.config import JudgeSpec
from clincot.models.checkpoint import UnsupportedCheckpoint, check_no_adapter
from clincot.models.endpoint import build_endpoint_judge
from clincot.models.precision import choose_device, choose_dtype
from clincot.models.protocols import Judge

if TYPE_CHECKING:
    from clincot.models.vlm import VisionLanguageModel


def load_policy(path: Path | str, *, dtype: str = "auto") -> VisionLanguageModel:
    """Load the policy of a checkpoint folder; the last few models stay in memory until `unload_models` is called.

    dtype: number type of a stage (`models.dtype`, or the stage's own).
    """
    return _load_in_process(str(path), "", dtype)


def load_judge(spec: JudgeSpec, *, dtype: str = "auto") -> Judge:
    """Load a judge: an endpoint if `url` is set, otherwise a checkpoint in this process."""
    if spec.url:
        return build_endpoint_judge(spec)
    if spec.text_only:
        from clincot.models.text_model import LanguageModelJudge

        device = choose_device()
        kind = choose_dtype("auto" if dtype == "inherit" else dtype, device)
        return LanguageModelJudge(
            spec.checkpoint, name=spec.name, device=device, dtype=kind, thinking=spec.thinking != "off"
        )
    model = _load_in_process(spec.checkpoint, spec.name, dtype)
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
        check_no_adapter(folder)
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
    """Unload all models, so that training or a server can use the memory."""
    _load_model.cache_clear()
    if "torch" in sys.modules and choose_device() == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()  # torch would keep the memory for itself


def _load_in_process(path: str, name: str, dtype: str) -> VisionLanguageModel:
    device = choose_device()
    # a section that nobody filled in (Params.get_stage_config) inherits the default of models.dtype
    return _load_model(path, name, device, choose_dtype("auto" if dtype == "inherit" else dtype, device))


@lru_cache(maxsize=4)
def _load_model(path: str, name: str, device: str, dtype: str) -> VisionLanguageModel:
    from clincot.models.vlm import VisionLanguageModel

    return VisionLanguageModel(path, name=name, device=device, dtype=dtype)
