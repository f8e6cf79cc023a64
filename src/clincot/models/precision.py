"""Device and number type of models that are loaded for inference.

`auto` is bfloat16 on a GPU that computes in it and float32 elsewhere: published checkpoints are bfloat16, and a
processor is slower in it than in float32. The environment variable CLINCOT_DTYPE overrides every setting of a process.
"""

from __future__ import annotations

import os
from typing import get_args

from clincot.config.sections import InferenceDtype
from clincot.errors import InvalidInput

DTYPE_ENV = "CLINCOT_DTYPE"


def choose_device() -> str:
    import torch  # 3 s, which a stage whose models are endpoints does not spend

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(dtype: str, device: str) -> str:
    """The type in which a model is loaded: float32, bfloat16 or float16.

    dtype: a setting; CLINCOT_DTYPE overrides it. Raises InvalidInput for any other value.
    """
    override = os.environ.get(DTYPE_ENV, "")
    chosen = override or dtype
    if chosen not in get_args(InferenceDtype):
        source = f"{DTYPE_ENV}={override}" if override else f"dtype {dtype!r}"
        raise InvalidInput(f"{source}: expected one of {', '.join(get_args(InferenceDtype))}")
    if chosen != "auto":
        return chosen
    import torch

    # without emulation: before Ampere a GPU has no bfloat16 units, and torch computes in float32 and rounds
    on_gpu = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if on_gpu else "float32"
