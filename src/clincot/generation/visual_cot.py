"""The visual chain of thought at inference: hypotheses, regions, an answer from each region, one answer.

The same code whether the policy runs in this process or behind an endpoint: it needs `models.protocols.Policy` alone.

Every region's answer is greedy. Answers that are equal after normalisation are one answer, and

    confidence(a) = 1/n · Σ_r [answer of r is a] · p(answer of r | r)        n regions, p: product over the tokens

If each of the n regions were as good a place to look as any other, the policy's probability of `a` would be
1/n · Σ_r p(a | r). Of that sum the confidence has the terms that were measured, so it never says more than the policy
does: it is 1 only where all regions agree and none leaves a doubt. Grounders' confidences do not weigh in, because they
cannot be compared across grounders (generation/masks.py). `agreement` is the plain share of regions that say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from clincot.config import ProposeConfig
from clincot.fields import FrozenModel, UnitFloat
from clincot.generation.candidates import is_written
from clincot.generation.hypotheses import choose_hypotheses
from clincot.generation.regions import build_grounder, propose_regions
from clincot.geometry import Box
from clincot.models.protocols import Generation, Policy
from clincot.prompts import ChainStep, chain_prompt, hash_prompt
from clincot.records import Question, Region, Study
from clincot.text import normalize_text


class AnswerSettings(Protocol):
    """The settings that shape an answer; a server's settings have them among others."""

    @property
    def propose(self) -> ProposeConfig:
        """Which regions an answer looks at."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Longest answer from one region, in tokens."""
        ...

    @property
    def abstain_below(self) -> float:
        """Confidence under which an answer abstains."""
        ...


@dataclass(frozen=True)
class ImageQuestion:
    """A question about an image that lies in `folder`."""

    study: Study
    folder: Path
    text: str


class _VisualAnswerPart(FrozenModel):
    pass


class ProposedRegion(_VisualAnswerPart):
    """A region that is looked at."""

    hypothesis: str  # what was looked for there
    grounder: str  # "written": by the policy itself; "windows", "http", …; "whole": all of the image
    box: Box  # normalised x0, y0, x1, y1 of the upright image
    found: Annotated[UnitFloat, Field(description="the grounder's confidence; says nothing across grounders")]


class RegionAnswer(ProposedRegion):
    """What the policy answers from one region."""

    answer: str
    likelihood: Annotated[UnitFloat, Field(description="the policy's probability of its answer, looking there")]


class VisualAnswer(_VisualAnswerPart):
    """An answer with the chain behind it: the extension `clincot` of every reply."""

    answer: str  # also where `abstained`: what would have been said
    confidence: UnitFloat
    agreement: Annotated[UnitFloat, Field(description="share of the regions whose answer it is")]
    abstained: bool
    hypotheses: tuple[str, ...]
    regions: tuple[RegionAnswer, ...]  # the whole image last
    winner: Annotated[int, Field(ge=0, description="position in `regions` of the region it was seen in best")]
    policy: str  # digest of the checkpoint
    prompt: str  # digest of the wording
    overlay: str | None = None  # data URI of a PNG: the image, the winning region drawn

    @property
    def box(self) -> Box:
        return self.regions[self.winner].box


class RegionsProposed(_VisualAnswerPart):
    """Where an answer will be looked for: known before the answer is. A stream's extension until then."""

    hypotheses: tuple[str, ...]
    regions: tuple[ProposedRegion, ...]  # the whole image last


def answer_question(
    asked: ImageQuestion,
    policy: Policy,
    settings: AnswerSettings,
    *,
    tell: Callable[[RegionsProposed], None] = lambda _: None,
) -> VisualAnswer:
    """The whole chain of one question; `tell` hears of the regions before they are looked at. Raises what the policy
    raises."""
    question = Question(study=asked.study.id, text=asked.text, kind="open")
    config = settings.propose
    grounders = [(build_grounder(name, config, policy, n), n) for name, n in config.grounders.items()]
    regions = list(propose_regions([question], {asked.study.id: asked.study}, asked.folder, grounders, config))
    sought = choose_hypotheses(asked.text, modality=asked.study.modality, limit=config.hypotheses)
    tell(
        RegionsProposed(
            hypotheses=sought,
            regions=tuple(ProposedRegion.model_validate(_describe_region(region)) for region in regions),
        )
    )
    steps = [ChainStep(asked.text, region.box, is_written(region)) for region in regions]
    replies = policy.generate(
        [chain_prompt(asked.study, asked.folder, policy.views, [step]) for step in steps],
        max_new_tokens=settings.max_new_tokens,
        temperature=0.0,
        seeds=[0] * len(regions),
    )
    seen = [_build_region_answer(region, reply) for region, reply in zip(regions, replies, strict=True)]
    answer, winner, confidence, agreement = combine_region_answers(seen)
    return VisualAnswer(
        answer=answer,
        confidence=confidence,
        agreement=agreement,
        abstained=confidence < settings.abstain_below,
        hypotheses=sought,
        regions=tuple(seen),
        winner=winner,
        policy=policy.digest,
        prompt=hash_prompt(policy.views),
    )


def combine_region_answers(seen: Sequence[RegionAnswer]) -> tuple[str, int, float, float]:
    """(answer, winning region, confidence, agreement); of equally confident answers the one seen first.

    The answer is worded as in its winning region: the one of greatest likelihood, the first of equals.
    """
    if not seen:
        raise ValueError("no region was looked at; the whole image always is one")
    groups: dict[str, list[int]] = {}
    for position, one in enumerate(seen):
        groups.setdefault(normalize_text(one.answer), []).append(position)
    mass = {words: sum(seen[i].likelihood for i in group) / len(seen) for words, group in groups.items()}
    best = max(groups, key=lambda words: mass[words])
    winner = max(groups[best], key=lambda i: seen[i].likelihood)
    return seen[winner].answer, winner, min(1.0, round(mass[best], 6)), round(len(groups[best]) / len(seen), 6)


def measure_leads(answer: VisualAnswer) -> tuple[float, float]:
    """How far others are behind: the next answer in confidence, and the next region that says the same in likelihood.

    What leads by less than sums round differently elsewhere (another batch, another machine) may not lead there.
    """
    best = normalize_text(answer.answer)
    mass: dict[str, float] = {}
    for region in answer.regions:
        said = normalize_text(region.answer)
        mass[said] = mass.get(said, 0.0) + region.likelihood / len(answer.regions)
    others = [
        r.likelihood for i, r in enumerate(answer.regions) if i != answer.winner and normalize_text(r.answer) == best
    ]
    next_answer = max((m for said, m in mass.items() if said != best), default=0.0)
    return mass[best] - next_answer, answer.regions[answer.winner].likelihood - max(others, default=0.0)


def _build_region_answer(region: Region, reply: Generation) -> RegionAnswer:
    likelihood = math.exp(min(0.0, sum(reply.token_logprobs)))
    return RegionAnswer(**_describe_region(region), answer=reply.text, likelihood=round(likelihood, 6))


def _describe_region(region: Region) -> dict[str, Any]:
    return {"hypothesis": region.hypothesis, "grounder": region.grounder, "box": region.box, "found": region.confidence}
