"""The engine of the stages travels through a pipeline in the sections of the stages."""

from __future__ import annotations

import pytest

from clincot.config import load_params
from clincot.pipelines.params import parse_stage_config
from clincot.pipelines.run_form import split_sections


@pytest.mark.parametrize("stage", ["propose", "answer", "judge", "evaluate"])
def test_a_task_runs_the_engine_of_models(stage: str) -> None:
    """Sections of `transformers` look as before; with vLLM each has the engine and the server's settings."""
    _, before = split_sections(load_params(None))
    assert "engine" not in before[stage]
    params = load_params(None, ("models.engine=vllm", "models.vllm.max_model_len=4096"))
    _, sections = split_sections(params)
    parsed = parse_stage_config(stage, sections[stage])
    assert parsed.engine.kind == "vllm"  # type: ignore[attr-defined]
    assert parsed.engine.vllm.max_model_len == 4096  # type: ignore[attr-defined]
    assert parsed == params.get_stage_config(stage)


def test_training_has_no_engine() -> None:
    _, sections = split_sections(load_params(None, ("models.engine=vllm",)))
    assert [name for name, section in sections.items() if "engine" in section] == [
        "propose",
        "answer",
        "judge",
        "evaluate",
    ]
