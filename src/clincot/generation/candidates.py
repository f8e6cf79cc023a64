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

from clincot.batching import in_units
from clincot.config import AnswerSection
from clincot.errors import BadInput
from clincot.generation.grounders import seed_of
from clincot.models.protocols import Policy
from clincot.prompts import Conversation, Step, chain, prompt_digest
from clincot.records import Candidate, Question, Region, Study


@dataclass(frozen=True)
class Ask:
    """One candidate to be written: a question, a region, and what came before in its chain."""

    study: Study
    question: Question
    region: Region
    before: tuple[tuple[Region, Candidate], ...] = ()

    def conversation(self, folder: Path, policy: Policy, steps: Sequence[str]) -> Conversation:
        report = self.question.kind == "report"
        done = [
            Step(worded(steps[c.step], self.question), r.box, c.region_written, c.text, report=report)
            for r, c in self.before
        ]
        now = Step(worded(steps[len(done)], self.question), self.region.box, is_written(self.region), report=report)
        return chain(self.study, folder, policy.views, [*done, now])


def worded(step: str, question: Question) -> str:
    """A step's question; {question} stands for the data set's."""
    return step.replace("{question}", question.text)


def is_written(region: Region) -> bool:
    """Whether the policy wrote the region itself, which makes it an action and not an input."""
    return region.grounder == "written"


def answer_regions(asks: Iterable[Ask], folder: Path, policy: Policy, section: AnswerSection) -> Iterator[Candidate]:
    """One candidate an ask, streaming, in order. Each samples from a seed of its own content."""
    for batch in _batches(asks, section):
        prompt = prompt_digest(policy.views, report=batch[0].question.kind == "report")
        parents = [ask.before[-1][1].id if ask.before else "" for ask in batch]
        seeds = [seed_of(section.seed, ask.region.id, parent) for ask, parent in zip(batch, parents, strict=True)]
        replies = policy.write(
            [ask.conversation(folder, policy, section.steps) for ask in batch],
            max_new_tokens=section.longest(batch[0].question.kind),
            temperature=section.temperature,
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
                temperature=section.temperature,
            )


def _batches(asks: Iterable[Ask], section: AnswerSection) -> Iterator[list[Ask]]:
    """Asks in their order, of one unit; those of a batch all ask for reports, or none does: a report may be longer."""
    numbered = in_units(asks, lambda ask: ask.question.id)
    for _, run in groupby(numbered, key=lambda one: (one[0], one[1].question.kind == "report")):
        while batch := [ask for _, ask in islice(run, section.batch_size)]:
            yield batch


def first_step(questions: Iterable[Question], studies: Mapping[str, Study], regions: Iterable[Region]) -> Iterator[Ask]:
    """An ask for every region, given in the questions' order."""
    waiting = iter(questions)
    question = None
    for region in regions:
        while question is None or question.id != region.question:
            question = next(waiting, None)
            if question is None:
                raise BadInput(
                    f"region {region.id} is of question {region.question}, which is not among the questions or out of "
                    "order; regions must come from the same questions file"
                )
        yield Ask(studies[question.study], question, region)


def next_step(asked: Sequence[tuple[Ask, Candidate, float | None]]) -> Iterator[Ask]:
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
            yield Ask(ask.study, ask.question, region, _line(candidate, by_id))


def _line(candidate: Candidate, by_id: Mapping[str, tuple[Ask, Candidate]]) -> tuple[tuple[Region, Candidate], ...]:
    """The chain that ends in a candidate, first step first."""
    ask, _ = by_id[candidate.id]
    before = _line(by_id[candidate.parent][1], by_id) if candidate.parent else ()
    return (*before, (ask.region, candidate))
