"""The protocols of policies, judges and grounders, and the types that they exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from clincot.clients.http import HttpFailure, RequestRetries
from clincot.geometry import Box, RegionMask
from clincot.prompts import Conversation, PromptFormat
from clincot.records import Question, Study

# Smallest P(yes) + P(no) for which their ratio is used. Below it, the model would write yes or no in fewer than one of
# a thousand replies: it is about to write something else, and the ratio is noise. Endpoints list only the 20 likeliest
# tokens; the missing ones make the sum smaller, so they can remove a score here but never create one.
MIN_YES_NO_MASS = 1e-3


@dataclass(frozen=True)
class Generation:
    """A generated assistant turn."""

    text: str  # decoded without the end-of-turn token, stripped
    token_logprobs: tuple[float, ...]  # nats, at temperature 1, of every generated token including the end of turn
    cut_off: bool = False  # max_new_tokens was reached before the end of turn
    prompt_tokens: int | None = None  # length of the encoded conversation, pictures included; None: unknown


NO_PROBABILITY = "neither yes nor no has a probability to speak of"


@dataclass(frozen=True)
class JudgeReply:
    """What a judge says about one candidate: P(right), or the reason why there is no score."""

    score: float | None
    reason: str = ""
    mass: float | None = None  # P(yes) + P(no); None: unknown, or not asked for yes or no
    failed: bool = False  # the request failed; another attempt may give a score


class Policy(Protocol):
    """A vision-language model that proposes regions and answers questions."""

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
        """The next assistant turn of each conversation; temperature 0 is greedy. `seeds`: one for each conversation."""
        ...

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) of the next token; None if both together have less than MIN_YES_NO_MASS."""
        ...


class PolicyWrapper:
    """A policy that passes everything on to another one; a subclass changes the calls that differ."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def digest(self) -> str:
        return self._policy.digest

    @property
    def views(self) -> PromptFormat:
        return self._policy.views

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        return self._policy.generate(conversations, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        return self._policy.p_yes(conversations)


class Judge(Protocol):
    """A model that rates how likely a candidate is right. Raises ModelFailed if a whole call fails."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def views(self) -> PromptFormat: ...

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]: ...


class RemoteJudge(Judge, Protocol):
    """A judge whose conversations are separate requests, any of which may fail on its own."""

    @property
    def reads_probabilities(self) -> bool:
        """Whether its scores are probabilities of the words yes and no."""
        ...

    def rate(
        self,
        conversations: Sequence[Conversation],
        *,
        retry: RequestRetries,
        on_reply: Callable[[int, JudgeReply], None] | None = None,
        on_retry: Callable[[HttpFailure, float], None] | None = None,
    ) -> list[JudgeReply]:
        """Rate each conversation; raises ModelFailed if the endpoint fails as a whole.

        on_reply: called with the position of each reply as it comes, from several threads at once.
        """
        ...


def is_remote(judge: Judge) -> TypeGuard[RemoteJudge]:
    """Whether a judge is asked by requests. An isinstance check of a protocol would request the digest."""
    return hasattr(judge, "rate")


@dataclass(frozen=True)
class GroundedRegion:
    """A region that a grounder proposes for a hypothesis."""

    hypothesis: str
    box: Box
    confidence: float  # in [0, 1]
    mask: RegionMask | None = None  # the region's pixels, from a grounder that segments


@dataclass(frozen=True)
class GroundingQuery:
    """A question about an image, and the hypotheses to localise for it."""

    study: Study
    question: Question
    hypotheses: tuple[str, ...]


def group_by_study(queries: Sequence[GroundingQuery]) -> Iterator[tuple[Study, list[GroundingQuery]]]:
    """Each image with its queries; the queries of an image must be consecutive."""
    for _, group in groupby(queries, key=lambda query: query.study.id):
        of_study = list(group)
        yield of_study[0].study, of_study


def collect_findings(queries: Sequence[GroundingQuery]) -> list[str]:
    """The distinct hypotheses of the queries, sorted, without "normal", which has no place in the image."""
    findings: set[str] = set()
    for query in queries:
        findings.update(query.hypotheses)
    return sorted(findings - {"normal"})


class Grounder(Protocol):
    """Finds where hypotheses would be seen, for many queries at once; images are below `folder`.

    Returns one list for each query, best first; a list may be empty.
    """

    @property
    def name(self) -> str: ...

    def ground(self, queries: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]: ...


class RelevancePolicy(Policy, Protocol):
    """A policy in this process whose gradients are accessible."""

    def compute_relevance(self, conversations: Sequence[Conversation]) -> list[npt.NDArray[np.float32]]:
        """A (rows, columns) map of the last picture of each conversation.

        A value is the contribution of that part of the picture to log P(yes)/P(no), in nats, compared with a part that
        looks like the mean of the last pictures of all conversations.
        """
        ...


def has_gradients(policy: Policy) -> TypeGuard[RelevancePolicy]:
    """Whether a policy computes relevance maps; one behind a server does not."""
    return hasattr(policy, "compute_relevance")
