"""Parameters of the pipeline: how configuration sections travel through KFP as JSON text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clincot.config import (
    AnswerConfig,
    EvaluateConfig,
    FrozenConfig,
    PrepareConfig,
    ProposeConfig,
    PublishConfig,
    parse_config,
)
from clincot.errors import InvalidInput
from clincot.records import hash_json
from clincot.stages.catalog import get_stage

JsonObject = Mapping[str, Any]


NULL_PLACEHOLDER = "null"


_SEED_DIGITS = 7  # hexadecimal, of a seed: every generator takes 28 bits, and a little more


def encode_params(content: JsonObject) -> dict[str, Any]:
    """A section as kfp takes it for a default: it knows no null, so "null" stands for it."""
    return {name: _replace_values(value, None, NULL_PLACEHOLDER) for name, value in content.items()}


def decode_params(content: JsonObject) -> dict[str, Any]:
    """The section again."""
    return {name: _replace_values(value, NULL_PLACEHOLDER, None) for name, value in content.items()}


def _replace_values(value: Any, old: Any, new: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _replace_values(one, old, new) for name, one in value.items()}
    if isinstance(value, list):
        return [_replace_values(one, old, new) for one in value]
    return new if value == old and type(value) is type(old) else value


def parse_stage_config(stage: str, content: JsonObject, *, lap: int = 0) -> FrozenConfig:
    """A stage's section of the pipeline's parameter; raises BadRecord naming the parameter and the key.

    lap: how often the questions of its round were asked before. From the second time on the seed is another one, which
    follows from the section's and the lap; the first time it is the section's own, as in `clincot rounds`, which never
    asks a question twice.
    """
    config: FrozenConfig = parse_config(
        get_stage(stage).config, decode_params(content), where=f"pipeline parameter {stage!r}"
    )
    if not int(lap):
        return config
    seed = int(hash_json([config.model_dump()["seed"], int(lap)])[:_SEED_DIGITS], 16)
    return config.model_copy(update={"seed": seed})


def build_prepare_config(content: JsonObject, number: int, rounds: int) -> tuple[PrepareConfig, int]:
    """The section of round `number` (1, 2, …), `rounds` of which are in this run, and its lap: after the last subset
    the first is asked again, in lap 1, 2, …, with other seeds (section_of)."""
    config = parse_config(PrepareConfig, decode_params(content), where="pipeline parameter 'prepare'")
    subsets = max(config.rounds, rounds)
    lap, subset = divmod(config.round + int(number) - 1, subsets)
    return config.model_copy(update={"rounds": subsets, "round": subset}), lap


def build_evaluate_config(content: JsonObject, propose: JsonObject) -> EvaluateConfig:
    """The section with the grounders of the round."""
    config = parse_config(EvaluateConfig, decode_params(content), where="pipeline parameter 'evaluate'")
    grounders = parse_config(ProposeConfig, decode_params(propose), where="pipeline parameter 'propose'")
    return config.model_copy(update={"propose": grounders})


def build_publish_config(content: JsonObject, number: int) -> PublishConfig:
    """The section with the checkpoint's round, unless it says one."""
    config = parse_config(PublishConfig, decode_params(content), where="pipeline parameter 'publish'")
    return config if config.round else config.model_copy(update={"round": int(number)})


def check_step_count(answer: JsonObject, compiled: int) -> None:
    """Raise BadInput where the answer section asks for another number of steps than the pipeline was compiled for."""
    steps = parse_config(AnswerConfig, decode_params(answer), where="pipeline parameter 'answer'").steps
    if len(steps) != int(compiled):
        raise InvalidInput(
            f"answer.steps has {len(steps)} questions, the pipeline was compiled for {int(compiled)}: compile it with "
            "these parameters (`clincot pipeline compile --params …`)"
        )
