"""The number type in which models are loaded for inference, and every setting that decides it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clincot.config import JudgeSpec, load_params
from clincot.config.server_settings import load_serve_settings
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord
from clincot.models.load import load_judge, load_policy, unload_models
from clincot.models.precision import choose_dtype
from clincot.models.vlm import VisionLanguageModel
from clincot.pipelines.round_plan import RoundPlan
from clincot.serving.backend import LocalBackend


def test_inference_is_float32_on_a_processor(small_dir: Path) -> None:
    assert VisionLanguageModel(small_dir).model.dtype == torch.float32
    assert load_policy(small_dir).model.dtype == torch.float32


def test_inference_is_bfloat16_on_a_gpu_that_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert choose_dtype("auto", "cuda") == dtype
        assert choose_dtype("auto", "cuda:1") == dtype
        assert choose_dtype("float32", "cuda") == "float32"
    assert choose_dtype("auto", "cpu") == "float32"


def test_one_variable_overrides_every_dtype(small_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINCOT_DTYPE", "bfloat16")
    assert load_policy(small_dir, dtype="float32").model.dtype == torch.bfloat16
    monkeypatch.setenv("CLINCOT_DTYPE", "half")
    with pytest.raises(InvalidInput, match="CLINCOT_DTYPE=half: expected one of auto, float32, bfloat16, float16"):
        load_policy(small_dir)


@pytest.mark.parametrize("stage", ["propose", "answer", "judge", "evaluate"])
def test_stages_inherit_the_dtype_of_models(stage: str) -> None:
    """`models.dtype` holds for every stage that loads a model, unless the stage has its own."""

    def read(*overrides: str) -> str:
        return str(load_params(None, overrides).get_stage_config(stage).model_dump()["dtype"])

    assert read() == "auto"
    assert read("models.dtype=bfloat16") == "bfloat16"
    assert read("models.dtype=bfloat16", f"{stage}.dtype=float32") == "float32"


def test_a_pipeline_carries_the_dtype_of_models_in_the_sections() -> None:
    """A task gets its own section only."""
    arguments = RoundPlan(params=load_params(None, ("models.dtype=float16", "judge.dtype=float32"))).arguments
    carried = {stage: arguments[stage]["dtype"] for stage in ("propose", "answer", "judge", "evaluate")}
    assert carried == {"propose": "float16", "answer": "float16", "judge": "float32", "evaluate": "float16"}


def test_a_stages_dtype_is_its_models(small_dir: Path) -> None:
    unload_models()
    policy = load_policy(small_dir, dtype="inherit")
    assert policy is load_policy(small_dir, dtype="auto") is load_policy(small_dir, dtype="float32")
    judge = load_judge(JudgeSpec(name="a judge", path=str(small_dir)), dtype="bfloat16")
    assert isinstance(judge, VisionLanguageModel)
    assert judge.model.dtype == torch.bfloat16
    unload_models()


@pytest.mark.parametrize(("dtype", "loaded"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_server_loads_in_its_dtype(dtype: str, loaded: torch.dtype, small_dir: Path) -> None:
    backend = LocalBackend(small_dir, load_serve_settings((f"dtype={dtype}",)), lambda kind, size: None)
    model = backend._batcher.model
    assert isinstance(model, VisionLanguageModel)
    assert model.model.dtype == loaded
    backend.close()
    with pytest.raises(InvalidRecord, match="a server has one model for regions and answers; set dtype instead"):
        load_serve_settings((f"dtype={dtype}", "propose.dtype=float16"))
