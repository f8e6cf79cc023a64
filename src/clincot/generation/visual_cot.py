"""The visual chain of thought at inference: hypotheses, regions, an answer from each region, one final answer.

It needs only `models.protocols.Policy`, so the policy may run in this process or behind an endpoint. The server answers
with it, and the benchmark's arm `served` calls the same code with the same settings (config.ServeConfig).

The answer from each region is greedy. Answers that are equal after normalisation count as one answer, and

    confidence(a) = 1/n · Σ_r [answer of r is a] · p(answer of r | r)        n regions, p: product over the tokens

If each of the n regions were equally likely to be the right place to look, the policy's probability of `a` would be
1/n · Σ_r p(a | r). The confidence keeps the terms of that sum that were measured, so it never exceeds that probability:
it is 1 only if all regions agree and each answer has probability 1. An answer that was cut off was not
measured to its end, and an empty one is off format (as in evaluation/evaluator.py), so both add nothing; if no region
gave another answer, the confidence is 0 and the answer abstains. The grounders' confidences do not enter, because they
cannot be compared across grounders (generation/masks.py). `agreement` is the share of regions with that answer.

A request may change the decoding (`AnswerDecoding`) and may add instructions, earlier questions and further images to
the prompt (`ImageQuestion`). The confidence remains a lower bound then: a sampled answer counts with its own
probability, and one that ends at a stop sequence with that of all tokens that were written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from clincot.config import ServeConfig
from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, UnitFloat
from clincot.generation.candidates import is_written
from clincot.generation.hypotheses import choose_hypotheses
from clincot.generation.regions import build_grounder, propose_regions
from clincot.geometry import WHOLE_IMAGE, Box
from clincot.models.protocols import Generation, Policy, PolicyWrapper
from clincot.prompts import (
    ChainStep,
    Conversation,
    PromptFormat,
    add_context_images,
    chain_prompt,
    get_template,
    hash_prompt,
)
from clincot.records import Question, Region, Study
from clincot.text import normalize_text


@dataclass(frozen=True)
class ImageQuestion:
    """A question about an image; the studies' paths are relative to `folder`.

    instructions: text before the first turn (a system message). history: earlier questions about the image with their
    answers, as steps of the chain that looked at the whole image. others: further images, in order, each with its role;
    the policy sees them after the first one, and no region is in them.
    """

    study: Study
    folder: Path
    text: str
    instructions: str = ""
    history: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[Study, str], ...] = ()


@dataclass(frozen=True)
class AnswerDecoding:
    """How the answers from the regions are decoded; the regions themselves are chosen as the settings say.

    max_new_tokens: a lower limit than that of the settings. temperature: 0 is greedy. stop: an answer ends before the
    first of these texts in it.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


GREEDY = AnswerDecoding()


AbstainReason = Literal["low_confidence", "cut_off", "off_format"]


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
    abstain_reason: Annotated[
        AbstainReason | None,
        Field(
            description="why the answer was withheld: its confidence is below the threshold, it was cut off at the "
            "token limit, or it is empty; absent if it was not withheld",
            exclude_if=lambda reason: reason is None,
        ),
    ] = None
    hypotheses: tuple[str, ...]
    regions: tuple[RegionAnswer, ...]  # the whole image last
    winner: Annotated[
        int, Field(ge=0, description="position in `regions` of the region with the likeliest such answer")
    ]
    policy: str  # digest of the checkpoint; of its name and prompts, behind a predictor of an unpublished one
    prompt: str  # digest of the prompt template
    settings: str = ""  # digest of the settings that decide the answer (config.ServeConfig.answer_digest)
    others: Annotated[
        tuple[str, ...],
        Field(
            description="roles of the further images that the policy saw, in order; absent without any",
            exclude_if=lambda roles: not roles,
        ),
    ] = ()
    overlay: str | None = None  # data URI of a PNG: the image with the winning region drawn on it
    image: Annotated[
        str | None,
        Field(
            description="data URI of a PNG: the upright image to which the boxes refer; absent unless asked for",
            exclude_if=lambda image: image is None,
        ),
    ] = None

    @property
    def cut_off(self) -> bool:
        """Whether the answer was cut off; then no region gave a usable one."""
        return self.regions[self.winner].cut_off

    @property
    def box(self) -> Box:
        """The winning region's box."""
        return self.regions[self.winner].box


class RegionsProposed(_VisualAnswerPart):
    """The regions that an answer will look at; a stream sends them as its extension before the answer is known."""

    hypotheses: tuple[str, ...]
    regions: tuple[ProposedRegion, ...]  # the whole image last


def check_max_images(settings: ServeConfig, views: PromptFormat) -> None:
    """Raise InvalidInput if questions may have several images, and the checkpoint's prompt has room for one only."""
    if settings.max_images > 1 and get_template(views).detect:
        raise InvalidInput(
            f"max_images is {settings.max_images}, but the first prompt of this checkpoint's family names only a "
            "finding to detect in one image; expected max_images: 1"
        )


def answer_question(
    asked: ImageQuestion,
    policy: Policy,
    settings: ServeConfig,
    *,
    decoding: AnswerDecoding = GREEDY,
    tell: Callable[[RegionsProposed], None] = lambda _: None,
) -> VisualAnswer:
    """Run the whole chain for one question.

    `tell` is called with the proposed regions before the policy answers from them. Raises what the policy raises.
    """
    policy = _ContextPolicy(policy, asked) if asked.instructions or asked.history or asked.others else policy
    chain = _propose_chains([asked], policy, settings)[0]
    proposed = tuple(ProposedRegion(**_describe_region(region)) for region in chain.regions)
    tell(RegionsProposed(hypotheses=chain.hypotheses, regions=proposed))
    return next(_answer_chains([chain], policy, settings, decoding))


def answer_questions(asked: Sequence[ImageQuestion], policy: Policy, settings: ServeConfig) -> Iterator[VisualAnswer]:
    """Run the chains of several questions about images of one folder, with forward passes in common.

    The answers are those of answer_question, in order, up to the rounding of larger batches.
    """
    yield from _answer_chains(_propose_chains(asked, policy, settings), policy, settings, GREEDY)


@dataclass(frozen=True)
class _Chain:
    """A question with the regions that its answer looks at."""

    asked: ImageQuestion
    hypotheses: tuple[str, ...]
    regions: tuple[Region, ...]


def _propose_chains(asked: Sequence[ImageQuestion], policy: Policy, settings: ServeConfig) -> list[_Chain]:
    """The regions of each question.

    Clients send an image without saying of what kind it is. The modality of a data set's image, which chooses the
    hypotheses, is therefore ignored: what is measured and stored as a golden answer would else differ from what a
    server answers.
    """
    config = settings.propose
    asked = [replace(item, study=item.study.model_copy(update={"modality": ""})) for item in asked]
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


def _answer_chains(
    chains: Sequence[_Chain], policy: Policy, settings: ServeConfig, decoding: AnswerDecoding
) -> Iterator[VisualAnswer]:
    prompts = []
    for chain in chains:
        for region in chain.regions:
            step = ChainStep(chain.asked.text, region.box, is_written(region))
            prompts.append(chain_prompt(chain.asked.study, chain.asked.folder, policy.views, [step]))
    generated = policy.generate(
        prompts,
        max_new_tokens=min(settings.max_new_tokens, decoding.max_new_tokens or settings.max_new_tokens),
        temperature=decoding.temperature,
        seeds=[decoding.seed + position for position in range(len(prompts))],
    )
    replies = iter([_apply_stop(reply, decoding.stop) for reply in generated])
    for chain in chains:
        answers = [_build_region_answer(region, next(replies)) for region in chain.regions]
        yield _join_answers(chain, answers, policy, settings)


def _join_answers(
    chain: _Chain, region_answers: Sequence[RegionAnswer], policy: Policy, settings: ServeConfig
) -> VisualAnswer:
    answer, winner, confidence, agreement = combine_region_answers(region_answers)
    reason = _find_abstain_reason(region_answers[winner], confidence, settings.abstain_below)
    return VisualAnswer(
        answer=answer,
        confidence=confidence,
        agreement=agreement,
        abstained=reason is not None,
        abstain_reason=reason,
        hypotheses=chain.hypotheses,
        regions=tuple(region_answers),
        winner=winner,
        policy=policy.digest,
        prompt=hash_prompt(policy.views),
        settings=settings.answer_digest,
        others=tuple(role for _, role in chain.asked.others),
    )


def combine_region_answers(regions: Sequence[RegionAnswer]) -> tuple[str, int, float, float]:
    """Combine the answers of all regions to (answer, position of the winning region, confidence, agreement).

    Answers that were cut off or are empty do not take part. If all are, all of them do, and the confidence is 0. Of
    equally confident answers the first one wins. The answer is worded as in its winning region, the one with the
    highest likelihood (the first of equals). Raises ValueError without regions.
    """
    if not regions:
        raise ValueError("no region was looked at; expected at least the whole image")
    usable = any(_is_usable(region) for region in regions)
    groups: dict[str, list[int]] = {}
    for position in _list_counted_positions(regions):
        groups.setdefault(normalize_text(regions[position].answer), []).append(position)
    confidences = {}
    for answer, positions in groups.items():
        confidences[answer] = sum(regions[i].likelihood for i in positions) / len(regions)
    best = max(groups, key=lambda answer: confidences[answer])
    winner = max(groups[best], key=lambda i: regions[i].likelihood)
    agreement = round(len(groups[best]) / len(regions), 6)
    confidence = min(1.0, round(confidences[best], 6)) if usable else 0.0
    return regions[winner].answer, winner, confidence, agreement


def _list_counted_positions(regions: Sequence[RegionAnswer]) -> list[int]:
    """The positions of the usable answers; of all answers if none is usable."""
    usable = [position for position, region in enumerate(regions) if _is_usable(region)]
    return usable or list(range(len(regions)))


def _is_usable(region: RegionAnswer) -> bool:
    """Whether the answer is complete and not empty."""
    return not region.cut_off and bool(normalize_text(region.answer))


def _find_abstain_reason(winner: RegionAnswer, confidence: float, threshold: float) -> AbstainReason | None:
    """Why the winning region's answer is withheld; None if it is given."""
    if winner.cut_off:
        return "cut_off"
    if not _is_usable(winner):
        return "off_format"
    return "low_confidence" if confidence < threshold else None


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


def _apply_stop(reply: Generation, stop: Sequence[str]) -> Generation:
    """End a reply before the first stop sequence; such a reply is complete, whatever followed."""
    starts = [start for word in stop if (start := reply.text.find(word)) >= 0]
    return replace(reply, text=reply.text[: min(starts)].strip(), cut_off=False) if starts else reply


class _ContextPolicy(PolicyWrapper):
    """A policy that reads instructions, history and further images of a question before everything that it writes.

    Ratings of windows (`p_yes`) have their own prompts, which stay as they are.
    """

    def __init__(self, policy: Policy, asked: ImageQuestion) -> None:
        super().__init__(policy)
        self._asked = asked

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        prompts = [self._add_context(conversation) for conversation in conversations]
        return super().generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)

    def _add_context(self, conversation: Conversation) -> Conversation:
        asked = self._asked
        steps = [ChainStep(question, WHOLE_IMAGE, False, answer) for question, answer in asked.history]
        if steps:  # the image is in the first turn of the history
            earlier = chain_prompt(asked.study, asked.folder, self.views, steps)
            known = tuple(replace(turn, action=False) for turn in earlier)  # the policy writes none of it now
            conversation = (*known, replace(conversation[0], pictures=()), *conversation[1:])
        conversation = add_context_images(conversation, asked.others, asked.folder, self.views)
        if asked.instructions:
            first = replace(conversation[0], text=f"{asked.instructions}\n\n{conversation[0].text}")
            conversation = (first, *conversation[1:])
        return conversation


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
