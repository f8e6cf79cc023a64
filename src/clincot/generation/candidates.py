"""Candidates: the policy's answer from every region of a question, step by step of a chain.

With one step (the default) a candidate is a region and an answer. With more, the best candidate of a step is kept as
context of the next [ClinCoT], and every other candidate is continued once as well, since a region is worth what it does
for what follows: s = s_cur + gamma * s_next [UV-CoT], computed in preferences/pairs.py from Candidate.parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from clincot.batching import iter_blocks
from clincot.config import AnswerConfig
from clincot.errors import InvalidInput
from clincot.generation.grounders import derive_seed
from clincot.models.protocols import Policy
from clincot.prompts import ChainStep, Conversation, chain_prompt, hash_prompt
from clincot.records import Candidate, Question, Region, Study


@dataclass(frozen=True)
class GenerationRequest:
    """One candidate to be written: a question, a region, and what came before in its chain."""

    study: Study
    question: Question
    region: Region
    before: tuple[tuple[Region, Candidate], ...] = ()

    def build_conversation(self, folder: Path, policy: Policy, steps: Sequence[str]) -> Conversation:
        report = self.question.kind == "report"
        done = [
            ChainStep(
                render_step_question(steps[c.step], self.question), r.box, c.region_written, c.text, report=report
            )
            for r, c in self.before
        ]
        now = ChainStep(
            render_step_question(steps[len(done)], self.question),
            self.region.box,
            is_written(self.region),
            report=report,
        )
        return chain_prompt(self.study, folder, policy.views, [*done, now])


def render_step_question(step: str, question: Question) -> str:
    """A step's question; {question} stands for the data set's."""
    return step.replace("{question}", question.text)


def is_written(region: Region) -> bool:
    """Whether the policy wrote the region itself, which makes it an action and not an input."""
    return region.grounder == "written"


def answer_regions(
    asks: Iterable[GenerationRequest], folder: Path, policy: Policy, config: AnswerConfig
) -> Iterator[Candidate]:
    """One candidate an ask, streaming, in order. Each samples from a seed of its own content."""
    for batch in _iter_batches(asks, config):
        prompt = hash_prompt(policy.views, report=batch[0].question.kind == "report")
        parents = [ask.before[-1][1].id if ask.before else "" for ask in batch]
        seeds = [derive_seed(config.seed, ask.region.id, parent) for ask, parent in zip(batch, parents, strict=True)]
        replies = policy.generate(
            [ask.build_conversation(folder, policy, config.steps) for ask in batch],
            max_new_tokens=config.get_max_tokens(batch[0].question.kind),
            temperature=config.temperature,
            seeds=seeds,
        )
        for ask, parent, seed, reply in zip(batch, parents, seeds, replies, strict=True):
            yield Candidate(
                question=ask.question.id,
                region=ask.region.id,
                text=reply.text,
                token_logprobs=reply.token_logprobs,
                region_written=is_written(ask.region),
                step=len(ask.before),
                parent=parent,
                policy=policy.digest,
                prompt=prompt,
                seed=seed,
                temperature=config.temperature,
            )


def _iter_batches(asks: Iterable[GenerationRequest], config: AnswerConfig) -> Iterator[list[GenerationRequest]]:
    """Asks in their order, of one unit; those of a batch all ask for reports, or none does: a report may be longer."""
    numbered = iter_blocks(asks, lambda ask: ask.question.id)
    for _, run in groupby(numbered, key=lambda one: (one[0], one[1].question.kind == "report")):
        while batch := [ask for _, ask in islice(run, config.batch_size)]:
            yield batch


def plan_first_step(
    questions: Iterable[Question], studies: Mapping[str, Study], regions: Iterable[Region]
) -> Iterator[GenerationRequest]:
    """An ask for every region, given in the questions' order."""
    waiting = iter(questions)
    question = None
    for region in regions:
        while question is None or question.id != region.question:
            question = next(waiting, None)
            if question is None:
                raise InvalidInput(
                    f"region {region.id} is of question {region.question}, which is not among the questions or out of "
                    "order; regions must come from the same questions file"
                )
        yield GenerationRequest(studies[question.study], question, region)


def plan_next_step(asked: Sequence[tuple[GenerationRequest, Candidate, float | None]]) -> Iterator[GenerationRequest]:
    """The asks of one question's next step, from every ask so far with its candidate and score.

    Every candidate of the last step is continued from its own region (its next score), the best one from every other
    region too. Unscored candidates end here.
    """
    last = max((candidate.step for _, candidate, _ in asked), default=0)
    by_id = {candidate.id: (ask, candidate) for ask, candidate, _ in asked}
    ending = [(ask, c, score) for ask, c, score in asked if c.step == last and score is not None]
    if not ending:
        return
    _, best, _ = max(ending, key=lambda one: (one[2], one[1].id))
    regions = {ask.region.id: ask.region for ask, _, _ in asked}
    for ask, candidate, _ in ending:
        chosen = [ask.region] + [r for r in regions.values() if candidate is best and r.id != ask.region.id]
        for region in chosen:
            yield GenerationRequest(ask.study, ask.question, region, _trace_chain(candidate, by_id))


def _trace_chain(
    candidate: Candidate, by_id: Mapping[str, tuple[GenerationRequest, Candidate]]
) -> tuple[tuple[Region, Candidate], ...]:
    """The chain that ends in a candidate, first step first."""
    ask, _ = by_id[candidate.id]
    before = _trace_chain(by_id[candidate.parent][1], by_id) if candidate.parent else ()
    return (*before, (ask.region, candidate))
