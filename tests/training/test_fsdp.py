"""A split model's checkpoint is that of a whole one. The split itself, over two processes: `make bench-processes`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from clincot.config import TrainConfig
from clincot.errors import InvalidInput
from clincot.models.checkpoint import hash_checkpoint
from clincot.models.vlm import VisionLanguageModel
from clincot.training import fsdp
from clincot.training.checkpoint_writer import save_checkpoint
from clincot.training.resolved_settings import Device, resolve_settings


def gathering(model: Any, kind: DistributedType = DistributedType.FSDP) -> Any:
    """A trainer's part of the work: accelerate gathers every weight as a tensor of its own, tied ones twice."""

    def gathered(model: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    accelerator = SimpleNamespace(get_state_dict=gathered, distributed_type=kind)
    return SimpleNamespace(accelerator=accelerator, model=model, model_wrapped=model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gathered_weights_are_published_as_the_same_bytes(
    dtype: str, policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output head is the embedding (tied): it stands in the file once, as transformers writes it."""
    policy = VisionLanguageModel(policy_dir)
    names = set(policy.model.state_dict())
    assert {"lm_head.weight", "model.text_model.embed_tokens.weight"} <= names
    assert fsdp.gather_weights(gathering(policy.model)) is None  # a model that is whole is written as it is
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    weights = fsdp.gather_weights(gathering(policy.model))
    assert weights is not None
    assert weights["lm_head.weight"] is weights["model.text_model.embed_tokens.weight"]
    settings = resolve_settings(TrainConfig(dtype=dtype), 1000, Device(gpu=False, bfloat16=False))
    at = {"settings": settings, "log": []}
    save_checkpoint(policy.model, policy.encoder.processor, policy.views, tmp_path / "split", weights=weights, **at)
    save_checkpoint(policy.model, policy.encoder.processor, policy.views, tmp_path / "whole", **at)
    if dtype == "float32":  # the bytes of weights alone: the second model's configuration was rounded with it
        assert hash_checkpoint(tmp_path / "split") == hash_checkpoint(tmp_path / "whole")
    split, whole = (tmp_path / name / "model.safetensors" for name in ("split", "whole"))
    assert split.read_bytes() == whole.read_bytes()


def test_a_model_that_would_not_be_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate splits models on GPUs, and trains whole ones in silence elsewhere."""
    fsdp.check_sharded(gathering(None, DistributedType.MULTI_CPU))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    fsdp.check_sharded(gathering(None))
    with pytest.raises(InvalidInput, match="among GPUs, and there are none here"):
        fsdp.check_sharded(gathering(None, DistributedType.MULTI_CPU))
