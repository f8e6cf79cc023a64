"""The pair stage: scored candidates become preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from clincot.config import PairConfig
from clincot.errors import InvalidInput
from clincot.jsonl import read_records, write_json, write_records
from clincot.records import Candidate, Judgement, PanelScore, Question, Region
from clincot.stages.base import Metrics, Paths, Stage

if TYPE_CHECKING:
    from clincot.judging.topic_agreement import PanelKnowledge

_OPTIONAL_INPUTS = ("questions", "regions", "judgements")


def pair(config: PairConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.preferences.pairs import make_pairs

    candidates = read_records(inputs["candidates"], Candidate)
    scores = read_records(inputs["scores"], PanelScore)
    topics: dict[str, str] | None = None
    if "questions" in inputs:
        topics = {q.id: q.topic or q.kind for q in read_records(inputs["questions"], Question)}
    knowledge = _measure_knowledge(config, inputs, topics or {}) if config.min_agreement > 0 else None
    pairs, report = make_pairs(candidates, scores, config, knowledge=knowledge, topics=topics)
    write_records(outputs["pairs"], pairs)
    write_json(outputs["pair_report"], report.model_dump(mode="json"))
    return {"pairs": len(pairs)}


def _measure_knowledge(config: PairConfig, inputs: Paths, topics: Mapping[str, str]) -> PanelKnowledge:
    from clincot.judging.topic_agreement import CandidateGroups, PanelKnowledge, measure_group_agreement

    needed = _OPTIONAL_INPUTS if config.agreement_by == "grounder" else ("questions", "judgements")
    if missing := [name for name in needed if name not in inputs]:
        raise InvalidInput(f"pair.min_agreement needs {', '.join(needed)}; got nothing for {', '.join(missing)}")
    grounders = None
    if config.agreement_by == "grounder":
        grounders = {region.id: region.grounder for region in read_records(inputs["regions"], Region)}
    groups = CandidateGroups(topics, grounders)
    agreement = measure_group_agreement(
        read_records(inputs["candidates"], Candidate), read_records(inputs["judgements"], Judgement), groups
    )
    return PanelKnowledge(groups, agreement, config.min_agreement, config.max_prejudice)


STAGE = Stage(
    name="pair",
    run=pair,
    config=PairConfig,
    inputs=("candidates", "scores"),
    outputs=("pairs", "pair_report"),
    device="cpu",
    about="Make preference pairs, with their score gaps, from the scored candidates.",
    optional=_OPTIONAL_INPUTS,
)
