"""The settings that a training run really uses, from the configuration, the model's size and the device.

Some defaults depend on what only the run knows: `dtype: auto` on the device, LoRA and gradient checkpointing on the
number of parameters. They are decided here, once, logged, and written next to the checkpoint (train_settings.json).
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from clincot.config import TrainConfig
from clincot.errors import InvalidInput

SETTINGS_FILE = "train_settings.json"  # in the checkpoint; its digest does not cover it

LARGE_MODEL_PARAMETERS = 1_000_000_000
# LoRA 128 / 256 with the projector at 2e-5 and gradient checkpointing: github.com/aiming-lab/MMedPO at bc959be,
# scripts/train_dpo_visual-text.sh (--lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5), after
# github.com/haotian-liu/LLaVA, scripts/v1_5/finetune_lora.sh.
LARGE_MODEL_LORA_R = 128
LARGE_MODEL_PROJECTOR_LR = 2e-5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """What the training's device can do."""

    gpu: bool
    bfloat16: bool

    @classmethod
    def detect(cls) -> Device:
        """The device of this process; emulated bfloat16 does not count."""
        gpu = torch.cuda.is_available()
        return cls(gpu, gpu and torch.cuda.is_bf16_supported(including_emulation=False))


@dataclass(frozen=True)
class ResolvedSettings:
    """The decisions that depend on the model's size and on the device."""

    parameters: int  # weights of the model, tied ones once
    lora_r: int  # 0: full fine-tuning
    lora_alpha: int
    train_projector: bool
    lr: float
    projector_lr: float
    dtype: Literal["float32", "bfloat16"]
    gradient_checkpointing: bool

    @property
    def weights_dtype(self) -> str:
        """Type in which the policy is loaded: small updates of trained weights are lost in bfloat16."""
        return self.dtype if self.lora_r else "float32"


def resolve_settings(config: TrainConfig, parameters: int, device: Device) -> ResolvedSettings:
    """Decide what the configuration leaves open, for a model of `parameters` weights.

    Above 1e9 parameters the default is LoRA of rank 128 with the projector at its own learning rate. Full fine-tuning
    of such a model has to be asked for: weights, gradients and Adam's two moments in float32 are 16 bytes a parameter.
    Raises InvalidInput for `quantization: 4bit`.
    """
    _check_quantization(config)
    large = parameters > LARGE_MODEL_PARAMETERS
    lora_r = choose_lora_rank(config, parameters)
    chosen_by_size = lora_r != config.lora_r
    projector_lr = config.projector_lr or (LARGE_MODEL_PROJECTOR_LR if chosen_by_size else config.lr)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.bfloat16 else "float32"
    return ResolvedSettings(
        parameters=parameters,
        lora_r=lora_r,
        lora_alpha=config.lora_alpha,
        train_projector=config.train_projector,
        lr=config.lr,
        projector_lr=projector_lr,
        dtype=dtype,
        gradient_checkpointing=large or (device.gpu and config.loss != "sft"),
    )


def choose_lora_rank(config: TrainConfig, parameters: int) -> int:
    """The rank of the LoRA for a model of `parameters` weights; 0: full fine-tuning."""
    if parameters > LARGE_MODEL_PARAMETERS and not config.lora_r and not config.full_finetuning:
        return LARGE_MODEL_LORA_R
    return config.lora_r


def count_step_parts(config: TrainConfig, processes: int = 1) -> int:
    """Into how many parts a step's batch is split: at most grad_accumulation, all of the same size on every process."""
    sizes = range(min(config.grad_accumulation, config.batch_size), 0, -1)
    return next((parts for parts in sizes if config.batch_size % (parts * processes) == 0), 1)


def _check_quantization(config: TrainConfig) -> None:
    if config.quantization != "none":
        missing = "" if find_spec("bitsandbytes") else ", and the package bitsandbytes is not installed here"
        raise InvalidInput(
            f"train.quantization {config.quantization} (QLoRA) is not supported: a LoRA is merged into the policy's "
            f"own weights, which quantised ones are not{missing}; set train.quantization: none (LoRA in bfloat16 needs "
            "about 2 bytes a parameter)"
        )


def log_settings(settings: ResolvedSettings) -> None:
    """Log the resolved settings in one line."""
    method = "full fine-tuning"
    if settings.lora_r:
        method = f"LoRA r {settings.lora_r}, alpha {settings.lora_alpha}"
    projector = f"projector at {settings.projector_lr:g}" if settings.train_projector else "projector frozen"
    checkpointing = "on" if settings.gradient_checkpointing else "off"
    _log.info(
        "training %.2f million parameters: %s at %g, %s, %s, gradient checkpointing %s",
        settings.parameters / 1e6,
        method,
        settings.lr,
        projector,
        settings.dtype,
        checkpointing,
    )


def describe_settings(settings: ResolvedSettings) -> dict[str, Any]:
    """The content of train_settings.json."""
    return asdict(settings)


def count_checkpoint_parameters(path: Path) -> int:
    """The number of weights of a checkpoint, counted on a model without memory (meta device); reads config.json only.

    Raises InvalidInput for a configuration that transformers cannot build an image-text-to-text model from.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    from clincot.models.quiet_loading import quiet_transformers

    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"{path}: cannot build the model of this configuration to count it: {error}") from error
    return count_parameters(model)


def count_parameters(model: torch.nn.Module) -> int:
    """The number of weights of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
