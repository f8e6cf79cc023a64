"""What a run really uses, by the model's size and the device; sizes are counted on models without weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaConfig

from clincot.config import TrainConfig
from clincot.errors import InvalidInput
from clincot.models.vlm import load_checkpoint
from clincot.training.resolved_settings import (
    Device,
    ResolvedSettings,
    count_checkpoint_parameters,
    count_parameters,
    count_step_parts,
    log_settings,
    resolve_settings,
)

CPU, GPU, OLD_GPU = Device(False, False), Device(True, True), Device(True, False)
SIZES = {  # hidden size, layers, feed-forward width of a Mistral backbone
    "7b": (4096, 32, 14336),
    "small": (512, 4, 1024),
}


@pytest.fixture(scope="module", params=SIZES)
def sized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A folder with config.json only: Llava on Mistral, as LLaVA-Med 1.5 is, and a small one."""
    hidden, layers, wide = SIZES[request.param]
    folder = tmp_path_factory.mktemp("sized") / request.param
    text = {
        "model_type": "mistral",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": wide,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, hidden // 512),
    }
    LlavaConfig(text_config=text).save_pretrained(folder)
    return request.param, folder


def resolve(parameters: int, device: Device = GPU, **changes: Any) -> ResolvedSettings:
    return resolve_settings(TrainConfig(**changes), parameters, device)


def test_parameters_are_counted_without_weights(sized: tuple[str, Path]) -> None:
    """7.57e9: Mistral's 7.24e9, CLIP-L/336's 0.30e9 and the projector's 0.02e9."""
    name, folder = sized
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    count = count_checkpoint_parameters(folder)
    assert count == pytest.approx(7.57e9, rel=0.01) if name == "7b" else count < 4e8
    assert (resolve(count).lora_r == 128) == (name == "7b")


def test_tied_weights_count_once(policy_dir: Path) -> None:
    model, _ = load_checkpoint(str(policy_dir))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert count_checkpoint_parameters(policy_dir) == count_parameters(model)
    assert count_parameters(model) == sum(tensor.numel() for tensor in {id(p): p for p in model.parameters()}.values())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava_mistral"}')
    with pytest.raises(InvalidInput, match="cannot build the model of this configuration"):
        count_checkpoint_parameters(tmp_path)


def test_a_large_model_is_trained_by_lora() -> None:
    """MMedPO's values; the projector has its own rate."""
    settings = resolve(7_000_000_000, lr=1e-7)
    assert settings == ResolvedSettings(
        parameters=7_000_000_000,
        lora_r=128,
        lora_alpha=256,
        train_projector=True,
        lr=1e-7,
        projector_lr=2e-5,
        dtype="bfloat16",
        gradient_checkpointing=True,
    )
    assert settings.weights_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "lora_r", "projector_lr"),
    [
        ({"full_finetuning": True}, 0, 1e-4),
        ({"lora_r": 16}, 16, 1e-4),
        ({"lora_r": 16, "projector_lr": 3e-5}, 16, 3e-5),
        ({"projector_lr": 3e-5}, 128, 3e-5),
    ],
)
def test_what_is_asked_for_is_used(changes: dict[str, Any], lora_r: int, projector_lr: float) -> None:
    settings = resolve(7_000_000_000, **changes)
    assert (settings.lora_r, settings.projector_lr) == (lora_r, projector_lr)
    assert settings.gradient_checkpointing


@pytest.mark.parametrize("parameters", [1_000_000, 1_000_000_000])
def test_a_small_model_is_trained_fully(parameters: int) -> None:
    settings = resolve(parameters, CPU)
    assert (settings.lora_r, settings.projector_lr, settings.dtype) == (0, 1e-4, "float32")
    assert not settings.gradient_checkpointing


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", GPU, "bfloat16"),
        ("auto", OLD_GPU, "float32"),
        ("auto", CPU, "float32"),
        ("float32", GPU, "float32"),
        ("bfloat16", CPU, "bfloat16"),
    ],
)
def test_dtype_follows_the_device(dtype: str, device: Device, expected: str) -> None:
    settings = resolve(1000, device, dtype=dtype)
    assert settings.dtype == expected
    assert settings.weights_dtype == "float32"  # all weights are trained: small updates would be lost in bfloat16
    assert resolve(1000, device, dtype=dtype, lora_r=4).weights_dtype == expected


def test_qlora_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clincot.training.resolved_settings.find_spec", lambda name: None)
    with pytest.raises(
        InvalidInput, match=r"quantization 4bit \(QLoRA\) is not supported: .* bitsandbytes is not inst"
    ):
        resolve(7_000_000_000, quantization="4bit")


@pytest.mark.parametrize("changes", [{"lora_r": 4}, {"quantization": "4bit"}])
def test_full_finetuning_excludes_adapters(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="full_finetuning trains all weights; set lora_r: 0"):
        TrainConfig(full_finetuning=True, **changes)


def test_settings_are_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "clincot"):
        log_settings(resolve(7_000_000_000, lr=1e-7))
    assert caplog.messages == [
        "training 7000.00 million parameters: LoRA r 128, alpha 256 at 1e-07, projector at 2e-05, bfloat16, "
        "gradient checkpointing on"
    ]


@pytest.mark.parametrize(
    ("batch", "wanted", "processes", "parts"),
    [(16, 16, 1, 16), (16, 4, 1, 4), (16, 5, 1, 4), (16, 16, 2, 8), (1, 1, 1, 1), (2, 8, 1, 2), (3, 2, 1, 1)],
)
def test_a_step_is_split_into_equal_parts(batch: int, wanted: int, processes: int, parts: int) -> None:
    """As many as are wanted, but each with as many pairs, and at least one on every process."""
    assert count_step_parts(TrainConfig(batch_size=batch, grad_accumulation=wanted), processes) == parts
