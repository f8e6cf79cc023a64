"""Parameters of the pipeline: how configuration sections travel through KFP as JSON text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clincot.config import (
    AnswerSection,
    EvaluateSection,
    PrepareSection,
    ProposeSection,
    PublishSection,
    Section,
    parse_section,
)
from clincot.errors import BadInput
from clincot.records import digest_of
from clincot.stages.catalog import stage_named

Content = Mapping[str, Any]


NULL = "null"


_SEED_DIGITS = 7  # hexadecimal, of a seed: every generator takes 28 bits, and a little more


def encoded(content: Content) -> dict[str, Any]:
    """A section as kfp takes it for a default: it knows no null, so "null" stands for it."""
    return {name: _replaced(value, None, NULL) for name, value in content.items()}


def decoded(content: Content) -> dict[str, Any]:
    """The section again."""
    return {name: _replaced(value, NULL, None) for name, value in content.items()}


def _replaced(value: Any, old: Any, new: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _replaced(one, old, new) for name, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, old, new) for one in value]
    return new if value == old and type(value) is type(old) else value


def section_of(stage: str, content: Content, *, lap: int = 0) -> Section:
    """A stage's section of the pipeline's parameter; raises BadRecord naming the parameter and the key.

    lap: how often the questions of its round were asked before. From the second time on the seed is another one, which
    follows from the section's and the lap; the first time it is the section's own, as in `clincot rounds`, which never
    asks a question twice.
    """
    section: Section = parse_section(stage_named(stage).config, decoded(content), where=f"pipeline parameter {stage!r}")
    if not int(lap):
        return section
    seed = int(digest_of([section.model_dump()["seed"], int(lap)])[:_SEED_DIGITS], 16)
    return section.model_copy(update={"seed": seed})


def prepare_section(content: Content, number: int, rounds: int) -> tuple[PrepareSection, int]:
    """The section of round `number` (1, 2, …), `rounds` of which are in this run, and its lap: after the last subset
    the first is asked again, in lap 1, 2, …, with other seeds (section_of)."""
    section = parse_section(PrepareSection, decoded(content), where="pipeline parameter 'prepare'")
    subsets = max(section.rounds, rounds)
    lap, subset = divmod(section.round + int(number) - 1, subsets)
    return section.model_copy(update={"rounds": subsets, "round": subset}), lap


def evaluate_section(content: Content, propose: Content) -> EvaluateSection:
    """The section with the grounders of the round."""
    section = parse_section(EvaluateSection, decoded(content), where="pipeline parameter 'evaluate'")
    grounders = parse_section(ProposeSection, decoded(propose), where="pipeline parameter 'propose'")
    return section.model_copy(update={"propose": grounders})


def publish_section(content: Content, number: int) -> PublishSection:
    """The section with the checkpoint's round, unless it says one."""
    section = parse_section(PublishSection, decoded(content), where="pipeline parameter 'publish'")
    return section if section.round else section.model_copy(update={"round": int(number)})


def checked_steps(answer: Content, compiled: int) -> None:
    """Raise BadInput where the answer section asks for another number of steps than the pipeline was compiled for."""
    steps = parse_section(AnswerSection, decoded(answer), where="pipeline parameter 'answer'").steps
    if len(steps) != int(compiled):
        raise BadInput(
            f"answer.steps has {len(steps)} questions, the pipeline was compiled for {int(compiled)}: compile it with "
            "these parameters (`clincot pipeline compile --params …`)"
        )
