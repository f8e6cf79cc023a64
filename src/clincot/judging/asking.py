"""Ask one judge: the prompt about a candidate, retries, and what the replies say about an endpoint."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

from clincot.clients.http import HttpFailure, RequestRetries
from clincot.config import JudgeConfig, JudgeSpec
from clincot.errors import ModelFailed
from clincot.geometry import Box, Cutout
from clincot.models.protocols import NO_PROBABILITY, Judge, JudgeReply, is_remote
from clincot.prompts import Conversation, JudgeStyle, judge_prompt, text_judge_prompt
from clincot.records import Study

_log = logging.getLogger(__name__)

_MIN_REPLIES = 20  # from which a share of failures, or scores that are all 0 or 1, say something about an endpoint
_NO_REAL_PROBABILITIES = (
    "all of its {count} scores are exactly 0 or 1 over {prompts} different prompts, so they are no probabilities: the "
    "server divides by the temperature 0 before it takes log-probabilities. Set `temperature: 1` for this judge, or "
    "serve the model with log-probabilities from before sampling (vLLM: --logprobs-mode raw_logprobs), or set "
    "`prompt: rubric`"
)


@dataclass(frozen=True)
class JudgeRequest:
    """What a judge needs to rate a candidate: the image, the region's box, the question, the answer."""

    candidate: str  # the candidate's id
    study: Study
    question: str  # as the candidate's chain step asked it
    box: Box
    answer: str
    unit: int = 0  # block number (batching.py); a batch never spans two blocks
    finding: str = ""  # the hypothesis for which the region was proposed; only text_only judges are told
    reference: str = ""  # the right answer, for `clincot calibrate` with judge.show_reference; never in a round
    cutout: Cutout | None = None  # of a region with a mask, as the policy saw it


@dataclass
class EndpointTally:
    """What one endpoint has replied so far, in the order of the candidates."""

    asked: int = 0
    failed: int = 0
    last_failure: str = ""
    scored: int = 0
    extreme: int = 0  # scores that are exactly 0 or 1
    mass_sum: float = 0.0
    masses: int = 0
    prompts: set[str] = field(default_factory=set)

    def add(self, request: JudgeRequest, reply: JudgeReply) -> None:
        """Count one reply."""
        self.asked += 1
        if reply.failed:
            self.failed += 1
            self.last_failure = reply.reason
        if reply.score is not None:
            self.scored += 1
            self.extreme += reply.score in (0.0, 1.0)
            self.prompts.add(repr((request.study.id, request.box, request.question, request.answer)))
        if reply.mass is not None:
            self.mass_sum += reply.mass
            self.masses += 1

    def find_fault(self, *, max_failures: float, probabilities: bool, last: bool) -> str:
        """Why the judge has to be excluded; "" if it does not. last: there are no further candidates."""
        too_many = self.failed > max_failures * self.asked and self.asked >= _MIN_REPLIES
        if too_many or (last and self.failed == self.asked > 0):
            return (
                f"{self.failed} of {self.asked} requests failed, judge.max_failures is {max_failures:.0%}; the last: "
                f"{self.last_failure}"
            )
        if probabilities and self.extreme == self.scored and len(self.prompts) >= _MIN_REPLIES:
            return _NO_REAL_PROBABILITIES.format(count=self.scored, prompts=len(self.prompts))
        return ""


def describe_failure(error: BaseException) -> str:
    return str(error) or type(error).__name__


def is_transient_failure(error: BaseException) -> bool:
    return error.transient if isinstance(error, HttpFailure) else isinstance(error, ModelFailed)


def warn_of_retry(judge: Judge, error: BaseException, delay_s: float) -> None:
    _log.warning("judge %s failed (%s); retrying in %.3g s", judge.name, describe_failure(error), delay_s)


def build_retry_policy(
    config: JudgeConfig, *, sleep: Callable[[float], None] = time.sleep, draw: Callable[[], float] = random.random
) -> RequestRetries:
    """How requests to endpoints are retried."""
    return RequestRetries(
        retries=config.retries,
        delay_s=config.retry_delay_s,
        sleep=sleep,
        draw=draw,
    )


def get_judge_style(config: JudgeConfig, name: str) -> JudgeStyle:
    """What the judge of that name is shown and asked for; the defaults for a judge that is not in the config."""
    spec: JudgeSpec | None = next((spec for spec in config.judges if spec.name == name), None)
    if spec is None:
        return JudgeStyle()
    return JudgeStyle(
        form="rating" if spec.rating else spec.prompt,
        text_only=spec.text_only,
        reference=spec.text_only and config.show_reference,
    )


def build_judge_conversation(judge: Judge, style: JudgeStyle, request: JudgeRequest, folder: Path) -> Conversation:
    """The prompt about a candidate: image, crop, question and answer, or their text for a text_only judge."""
    if style.text_only:
        return text_judge_prompt(
            question=request.question,
            answer=request.answer,
            box=request.box,
            finding=request.finding,
            reference=request.reference if style.reference else "",
        )
    return judge_prompt(
        request.study,
        folder,
        judge.views,
        question=request.question,
        answer=request.answer,
        box=request.box,
        cutout=request.cutout,
    )


def rate_requests(
    judge: Judge, style: JudgeStyle, requests: Sequence[JudgeRequest], folder: Path, retry: RequestRetries
) -> list[JudgeReply]:
    """The judge's replies to all requests at once, outside a panel. Raises ModelFailed."""
    if not is_remote(judge):
        return ask_local_judge(judge, style, requests, folder)
    prompts = [build_judge_conversation(judge, style, request, folder) for request in requests]
    return judge.rate(prompts, retry=retry, on_retry=lambda e, d: warn_of_retry(judge, e, d))


def ask_local_judge(judge: Judge, style: JudgeStyle, batch: Sequence[JudgeRequest], folder: Path) -> list[JudgeReply]:
    """The reply about each candidate; raises ModelFailed if the whole call failed."""
    replies = judge.p_yes([build_judge_conversation(judge, style, request, folder) for request in batch])
    if len(replies) != len(batch):
        raise ModelFailed(f"gave {len(replies)} scores for {len(batch)} candidates")
    return [_parse_score(reply) for reply in replies]


def _parse_score(reply: float | None) -> JudgeReply:
    """The probability unchanged, or the reason why the reply is not one; nothing is clipped into range."""
    if reply is None:
        return JudgeReply(None, reason=NO_PROBABILITY)
    if isinstance(reply, bool) or not isinstance(reply, Real):
        return JudgeReply(None, reason=f"the judge gave a {type(reply).__name__} where a probability was expected")
    score = float(reply)
    if not math.isfinite(score):
        return JudgeReply(None, reason="the judge gave a number that is not finite")
    if not 0.0 <= score <= 1.0:
        return JudgeReply(None, reason="the judge gave a number outside [0, 1]")
    return JudgeReply(score)
