"""The visual chain of thought at inference: hypotheses, regions, an answer from each region, one final answer.

It needs only `models.protocols.Policy`, so the policy may run in this process or behind an endpoint. The server answers
with it, and the benchmark's arm `served` calls the same code with the same settings (config.ServeConfig).

The answer from each region is greedy. Answers that are equal after normalisation count as one answer, and

    confidence(a) = 1/n · Σ_r [answer of r is a] · p(answer of r | r)        n regions, p: product over the tokens

If each of the n regions were equally likely to be the right place to look, the policy's probability of `a` would be
1/n · Σ_r p(a | r). The confidence keeps the terms of that sum that were measured, so it never exceeds that probability:
it is 1 only if all regions agree and each answer has probability 1. An answer that was cut off was not
measured to its end, so it adds nothing; if all were cut off, the confidence is 0 and the answer abstains. An empty
answer is off format (as in evaluation/evaluator.py) and abstains as well. The grounders' confidences do not enter,
because they cannot be compared across grounders (generation/masks.py). `agreement` is the share of regions with that
answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from clincot.config import ServeConfig
from clincot.fields import FrozenModel, UnitFloat
from clincot.generation.candidates import is_written
from clincot.generation.hypotheses import choose_hypotheses
from clincot.generation.regions import build_grounder, propose_regions
from clincot.geometry import Box
from clincot.models.protocols import Generation, Policy
from clincot.prompts import ChainStep, chain_prompt, hash_prompt
from clincot.records import Question, Region, Study
from clincot.text import normalize_text


@dataclass(frozen=True)
class ImageQuestion:
    """A question about an image; the study's paths are relative to `folder`."""

    study: Study
    folder: Path
    text: str


class _VisualAnswerPart(FrozenModel):
    """Part of a reply; written with the wire names (aliases), read with either name."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_alias=True, validate_by_name=True)


class ProposedRegion(_VisualAnswerPart):
    """A region that the answer will look at."""

    hypothesis: str  # the finding that is looked for there
    grounder: str  # "written": by the policy itself; "windows", "http", …; "whole": the whole image
    box: Box  # normalised x0, y0, x1, y1 of the upright image
    grounder_confidence: Annotated[
        UnitFloat,
        Field(alias="found", description="the grounder's confidence; not comparable across grounders"),
    ]


class RegionAnswer(ProposedRegion):
    """The policy's answer from one region."""

    answer: str
    likelihood: Annotated[UnitFloat, Field(description="the policy's probability of its answer from this region")]
    cut_off: Annotated[
        bool,
        Field(
            description="the answer reached the token limit before its end, so it does not count; absent if false",
            exclude_if=lambda cut_off: not cut_off,
        ),
    ] = False


class VisualAnswer(_VisualAnswerPart):
    """An answer with the chain behind it: the extension `clincot` of every reply."""

    answer: str  # if `abstained`, the answer that was withheld
    confidence: UnitFloat
    agreement: Annotated[UnitFloat, Field(description="share of the regions that gave this answer")]
    abstained: bool
    hypotheses: tuple[str, ...]
    regions: tuple[RegionAnswer, ...]  # the whole image last
    winner: Annotated[
        int, Field(ge=0, description="position in `regions` of the region with the likeliest such answer")
    ]
    policy: str  # digest of the checkpoint
    prompt: str  # digest of the prompt template
    settings: str = ""  # digest of the settings that decide the answer (config.ServeConfig.answer_digest)
    overlay: str | None = None  # data URI of a PNG: the image with the winning region drawn on it

    @property
    def cut_off(self) -> bool:
        """Whether the answers from all regions were cut off."""
        return all(region.cut_off for region in self.regions)

    @property
    def box(self) -> Box:
        """The winning region's box."""
        return self.regions[self.winner].box


class RegionsProposed(_VisualAnswerPart):
    """The regions that an answer will look at; a stream sends them as its extension before the answer is known."""

    hypotheses: tuple[str, ...]
    regions: tuple[ProposedRegion, ...]  # the whole image last


def answer_question(
    asked: ImageQuestion,
    policy: Policy,
    settings: ServeConfig,
    *,
    tell: Callable[[RegionsProposed], None] = lambda _: None,
) -> VisualAnswer:
    """Run the whole chain for one question.

    `tell` is called with the proposed regions before the policy answers from them. Raises what the policy raises.
    """
    chain = _propose_chains([asked], policy, settings)[0]
    proposed = tuple(ProposedRegion(**_describe_region(region)) for region in chain.regions)
    tell(RegionsProposed(hypotheses=chain.hypotheses, regions=proposed))
    return next(_answer_chains([chain], policy, settings))


def answer_questions(asked: Sequence[ImageQuestion], policy: Policy, settings: ServeConfig) -> Iterator[VisualAnswer]:
    """Run the chains of several questions about images of one folder, with forward passes in common.

    The answers are those of answer_question, in order, up to the rounding of larger batches.
    """
    yield from _answer_chains(_propose_chains(asked, policy, settings), policy, settings)


@dataclass(frozen=True)
class _Chain:
    """A question with the regions that its answer looks at."""

    asked: ImageQuestion
    hypotheses: tuple[str, ...]
    regions: tuple[Region, ...]


def _propose_chains(asked: Sequence[ImageQuestion], policy: Policy, settings: ServeConfig) -> list[_Chain]:
    config = settings.propose
    grounders = [(build_grounder(name, config, policy, count), count) for name, count in config.grounders.items()]
    questions = [Question(study=item.study.id, text=item.text, kind="open") for item in asked]
    studies = {item.study.id: item.study for item in asked}
    regions: dict[str, list[Region]] = {question.id: [] for question in questions}
    distinct = {question.id: question for question in questions}
    for region in propose_regions(distinct.values(), studies, asked[0].folder, grounders, config):
        regions[region.question].append(region)
    chains = []
    for item, question in zip(asked, questions, strict=True):
        hypotheses = choose_hypotheses(item.text, modality=item.study.modality, limit=config.hypotheses)
        chains.append(_Chain(item, hypotheses, tuple(regions[question.id])))
    return chains


def _answer_chains(chains: Sequence[_Chain], policy: Policy, settings: ServeConfig) -> Iterator[VisualAnswer]:
    prompts = []
    for chain in chains:
        for region in chain.regions:
            step = ChainStep(chain.asked.text, region.box, is_written(region))
            prompts.append(chain_prompt(chain.asked.study, chain.asked.folder, policy.views, [step]))
    replies = iter(
        policy.generate(prompts, max_new_tokens=settings.max_new_tokens, temperature=0.0, seeds=[0] * len(prompts))
    )
    for chain in chains:
        answers = [_build_region_answer(region, next(replies)) for region in chain.regions]
        yield _join_answers(chain, answers, policy, settings)


def _join_answers(
    chain: _Chain, region_answers: Sequence[RegionAnswer], policy: Policy, settings: ServeConfig
) -> VisualAnswer:
    answer, winner, confidence, agreement = combine_region_answers(region_answers)
    return VisualAnswer(
        answer=answer,
        confidence=confidence,
        agreement=agreement,
        abstained=confidence < settings.abstain_below
        or not normalize_text(answer)
        or all(region.cut_off for region in region_answers),
        hypotheses=chain.hypotheses,
        regions=tuple(region_answers),
        winner=winner,
        policy=policy.digest,
        prompt=hash_prompt(policy.views),
        settings=settings.answer_digest,
    )


def combine_region_answers(regions: Sequence[RegionAnswer]) -> tuple[str, int, float, float]:
    """Combine the answers of all regions to (answer, position of the winning region, confidence, agreement).

    Answers that were cut off do not take part. If all were, all of them do, and the confidence is 0. Of equally
    confident answers the first one wins. The answer is worded as in its winning region, the one with the highest
    likelihood (the first of equals). Raises ValueError without regions.
    """
    if not regions:
        raise ValueError("no region was looked at; expected at least the whole image")
    complete = not all(region.cut_off for region in regions)
    groups: dict[str, list[int]] = {}
    for position in _list_counted_positions(regions):
        groups.setdefault(normalize_text(regions[position].answer), []).append(position)
    confidences = {}
    for answer, positions in groups.items():
        confidences[answer] = sum(regions[i].likelihood for i in positions) / len(regions)
    best = max(groups, key=lambda answer: confidences[answer])
    winner = max(groups[best], key=lambda i: regions[i].likelihood)
    agreement = round(len(groups[best]) / len(regions), 6)
    confidence = min(1.0, round(confidences[best], 6)) if complete else 0.0
    return regions[winner].answer, winner, confidence, agreement


def _list_counted_positions(regions: Sequence[RegionAnswer]) -> list[int]:
    """The positions of the complete answers; of all answers if none is complete."""
    complete = [position for position, region in enumerate(regions) if not region.cut_off]
    return complete or list(range(len(regions)))


def measure_leads(answer: VisualAnswer) -> tuple[float, float]:
    """(lead of the answer over the next one in confidence, lead of its region over the next that agrees in likelihood).

    Another batch or another machine rounds sums differently, so a lead below that rounding error may be lost there.
    """
    best = normalize_text(answer.answer)
    confidences: dict[str, float] = {}
    agreeing = []  # likelihoods of the other regions with the same answer
    for position in _list_counted_positions(answer.regions):
        region = answer.regions[position]
        text = normalize_text(region.answer)
        confidences[text] = confidences.get(text, 0.0) + region.likelihood / len(answer.regions)
        if text == best and position != answer.winner:
            agreeing.append(region.likelihood)
    next_answer = max((value for text, value in confidences.items() if text != best), default=0.0)
    return confidences[best] - next_answer, answer.regions[answer.winner].likelihood - max(agreeing, default=0.0)


def _build_region_answer(region: Region, reply: Generation) -> RegionAnswer:
    likelihood = math.exp(min(0.0, sum(reply.token_logprobs)))
    return RegionAnswer(
        **_describe_region(region), answer=reply.text, likelihood=round(likelihood, 6), cut_off=reply.cut_off
    )


def _describe_region(region: Region) -> dict[str, Any]:
    return {
        "hypothesis": region.hypothesis,
        "grounder": region.grounder,
        "box": region.box,
        "grounder_confidence": region.confidence,
    }
