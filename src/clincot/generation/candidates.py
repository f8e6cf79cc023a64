"""Candidates: the policy's answers from every region of a question, one chain step at a time.

With one step (the default) a candidate is a region and one of the answers sampled from it. With more steps, the best
candidate of a step becomes the context of the next one [ClinCoT], and every other candidate is continued as well, from
its own region or from every region (answer.continue_from), because a region is also worth what it contributes to later
steps: s = s_cur + gamma * s_next [UV-CoT], computed in preferences/pairs.py from Candidate.parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from clincot.batching import iter_blocks
from clincot.config import AnswerConfig
from clincot.errors import InvalidInput
from clincot.generation.grounders import derive_seed
from clincot.models.protocols import Policy
from clincot.prompts import ChainStep, Conversation, chain_prompt, hash_prompt
from clincot.records import Candidate, Question, Region, Study


@dataclass(frozen=True)
class GenerationRequest:
    """One candidate to generate: a question, a region and the earlier steps of its chain."""

    study: Study
    question: Question
    region: Region
    before: tuple[tuple[Region, Candidate], ...] = ()
    sample: int = 0  # number of this answer among those sampled from the region

    @property
    def parent(self) -> str:
        """The id of the candidate that this one continues; "" in the first step."""
        return self.before[-1][1].id if self.before else ""

    def derive_seed(self, seed: int) -> int:
        """The seed of this answer, from the stage's own and the content of the request."""
        repetition = [self.sample] if self.sample else []  # so that the first answer is the one of per_region: 1
        return derive_seed(seed, self.region.id, self.parent, *repetition)

    def build_conversation(self, folder: Path, policy: Policy, steps: Sequence[str]) -> Conversation:
        """The conversation that asks for this candidate; images are below `folder`."""
        report = self.question.kind == "report"
        earlier = [
            ChainStep(
                render_step_question(steps[candidate.step], self.question),
                region.box,
                candidate.region_written,
                candidate.text,
                report=report,
                cutout=region.cutout,
            )
            for region, candidate in self.before
        ]
        current = ChainStep(
            render_step_question(steps[len(earlier)], self.question),
            self.region.box,
            is_written(self.region),
            report=report,
            cutout=self.region.cutout,
        )
        return chain_prompt(self.study, folder, policy.views, [*earlier, current])


def render_step_question(step: str, question: Question) -> str:
    """The question of a chain step, with {question} replaced by the data set's question."""
    return step.replace("{question}", question.asked_text)


def is_written(region: Region) -> bool:
    """Whether the policy wrote the region itself, which makes it an action and not an input."""
    return region.grounder == "written"


def answer_regions(
    requests: Iterable[GenerationRequest], folder: Path, policy: Policy, config: AnswerConfig
) -> Iterator[Candidate]:
    """Yield one candidate for each request, in order; each samples with a seed derived from its own content."""
    for batch in _iter_batches(requests, config):
        prompt = hash_prompt(policy.views, report=batch[0].question.kind == "report")
        seeds = [request.derive_seed(config.seed) for request in batch]
        replies = policy.generate(
            [request.build_conversation(folder, policy, config.steps) for request in batch],
            max_new_tokens=config.get_max_tokens(batch[0].question.kind),
            temperature=config.temperature,
            seeds=seeds,
        )
        for request, seed, reply in zip(batch, seeds, replies, strict=True):
            yield Candidate(
                question=request.question.id,
                region=request.region.id,
                text=reply.text,
                token_logprobs=reply.token_logprobs,
                region_written=is_written(request.region),
                step=len(request.before),
                parent=request.parent,
                policy=policy.digest,
                prompt=prompt,
                seed=seed,
                temperature=config.temperature,
            )


def _iter_batches(requests: Iterable[GenerationRequest], config: AnswerConfig) -> Iterator[list[GenerationRequest]]:
    """Batches of requests in their order.

    A batch stays within one block (batching.py), and either all or none of its requests ask for a report, because
    reports have their own token limit.
    """
    numbered = iter_blocks(requests, lambda request: request.question.id)
    for _, run in groupby(numbered, key=lambda pair: (pair[0], pair[1].question.kind == "report")):
        while batch := [request for _, request in islice(run, config.batch_size)]:
            yield batch


def plan_first_step(
    questions: Iterable[Question], studies: Mapping[str, Study], regions: Iterable[Region], *, per_region: int = 1
) -> Iterator[GenerationRequest]:
    """Yield `per_region` requests for every region; regions must be in the order of the questions.

    Raises InvalidInput for a region of a question that is missing or out of order.
    """
    remaining = iter(questions)
    question = None
    for region in regions:
        while question is None or question.id != region.question:
            question = next(remaining, None)
            if question is None:
                raise InvalidInput(
                    f"region {region.id} is of question {region.question}, which is not among the questions or out of "
                    "order; regions must come from the same questions file"
                )
        for sample in range(per_region):
            yield GenerationRequest(studies[question.study], question, region, sample=sample)


def plan_next_step(
    answered: Sequence[tuple[GenerationRequest, Candidate, float | None]],
    *,
    continue_from: Literal["own", "all"] = "own",
) -> Iterator[GenerationRequest]:
    """Yield the requests of one question's next step.

    `answered` holds every request so far with its candidate and score. Every candidate of the last step is continued
    from its own region, which gives its s_next; the best one, or with `all` every one, is also continued from every
    other region. Chains whose last candidate has no score end here.
    """
    last_step = max((candidate.step for _, candidate, _ in answered), default=0)
    by_id = {candidate.id: (request, candidate) for request, candidate, _ in answered}
    continued = [
        (request, candidate, score)
        for request, candidate, score in answered
        if candidate.step == last_step and score is not None
    ]
    if not continued:
        return
    _, best, _ = max(continued, key=lambda scored: (scored[2], scored[1].id))  # the id makes ties deterministic
    regions = {request.region.id: request.region for request, _, _ in answered}
    for request, candidate, _ in continued:
        next_regions = [request.region]
        if candidate is best or continue_from == "all":
            next_regions += [region for region in regions.values() if region.id != request.region.id]
        for region in next_regions:
            yield GenerationRequest(request.study, request.question, region, _trace_chain(candidate, by_id))


def _trace_chain(
    candidate: Candidate, by_id: Mapping[str, tuple[GenerationRequest, Candidate]]
) -> tuple[tuple[Region, Candidate], ...]:
    """The chain that ends in a candidate, first step first."""
    request, _ = by_id[candidate.id]
    before = _trace_chain(by_id[candidate.parent][1], by_id) if candidate.parent else ()
    return (*before, (request.region, candidate))
