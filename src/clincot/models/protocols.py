"""What a policy, a judge and a grounder are, whoever implements them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from clincot.geometry import Box
from clincot.prompts import Conversation, PromptFormat
from clincot.records import Question, Study

# Least P(yes) + P(no) from which their ratio is read. Below it a model would say yes or no less than once in a thousand
# replies: it is about to say something else, and the ratio of what is left over is noise. Endpoints list the 20
# likeliest tokens only; what they leave out makes the sum smaller, so it can cost a score here and never make one.
MIN_YES_NO_MASS = 1e-3


@dataclass(frozen=True)
class Generation:
    text: str  # as decoded, without the end-of-turn token, stripped
    token_logprobs: tuple[float, ...]  # nats, at temperature 1, of every generated token with the end of turn
    cut_off: bool = False  # max_new_tokens came before the end of turn


class Policy(Protocol):
    """A vision-language model that looks and answers."""

    @property
    def digest(self) -> str: ...
    @property
    def views(self) -> PromptFormat: ...

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[Generation]:
        """The next assistant turn of each conversation; temperature 0 is greedy. One seed a conversation."""
        ...

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) of the next token; None where the two together have less than LEAST_YES_NO."""
        ...


class Judge(Protocol):
    """A model that says how likely a candidate is right. Raises ModelFailed when a whole call failed."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def views(self) -> PromptFormat: ...

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]: ...


@dataclass(frozen=True)
class GroundedRegion:
    """A place that a grounder found for a hypothesis."""

    hypothesis: str
    box: Box
    confidence: float  # in [0, 1]


@dataclass(frozen=True)
class GroundingQuery:
    """A question about an image, and the hypotheses whose places are sought for it."""

    study: Study
    question: Question
    hypotheses: tuple[str, ...]


def group_by_study(sought: Sequence[GroundingQuery]) -> Iterator[tuple[Study, list[GroundingQuery]]]:
    """Each image with its questions, which stand together."""
    for _, group in groupby(sought, key=lambda one: one.study.id):
        asked = list(group)
        yield asked[0].study, asked


def collect_findings(asked: Sequence[GroundingQuery]) -> list[str]:
    """The hypotheses of questions about one image, each once; "normal" is nowhere in particular."""
    return sorted({h for one in asked for h in one.hypotheses if h != "normal"})


class Grounder(Protocol):
    """Finds where a hypothesis would be seen, for many questions at once; images are below `folder`.

    One list a question, best first; an empty list is an answer.
    """

    @property
    def name(self) -> str: ...

    def ground(self, queries: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]: ...


class RelevancePolicy(Policy, Protocol):
    """A policy in this process, whose gradients can be read."""

    def compute_relevance(self, conversations: Sequence[Conversation]) -> list[npt.NDArray[np.float32]]:
        """For each conversation a (rows, columns) map of its last picture: how much each part of it adds to
        log P(yes)/P(no) (nats), beside a part that looks like the mean of all last pictures given."""
        ...
