"""Parse chat completions: P(yes), ratings, thinking blocks and generated text.

The shapes are those of the OpenAI API (openai-python 3.57.0, types/chat/chat_completion.py), which vLLM 0.32 returns as
well: `choices[0].logprobs.content` lists every generated token, including those of a thinking block that a reasoning
parser moved from `message.content` to `message.reasoning`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from clincot.models.protocols import MIN_YES_NO_MASS, NO_PROBABILITY, Generation, JudgeReply

LOGPROBS_REMEDY = "serve the model with something that returns them (vLLM does, `transformers serve` does not)"

_SPACE_MARKS = str.maketrans("▁ĠĊ", "   ")  # a space in SentencePiece, a space and a newline in byte-level BPE
_MARKUP = " \t\r\n*_`\"'"  # what models put around the answer after a thinking block
# How thinking blocks begin and end: Qwen3, DeepSeek-R1 and GLM write the first pair, Magistral the second.
_THINKING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_RATING_PATTERN = re.compile(r"(?<![\w.,/+−-])(\d{1,2}(?:\.\d+)?)\s*/\s*10(?![\w/]|[.,]\d)", re.ASCII)
_QUOTED_CHARS = 60


class _EndpointReply(BaseModel):
    """Part of a reply: additional fields are ignored, and a number written as text is refused."""

    model_config = ConfigDict(strict=True)


class Logprob(_EndpointReply):
    """A token with its log-probability."""

    token: str
    logprob: float


class TokenLogprob(Logprob):
    """A generated token, and the likeliest tokens at its position."""

    top_logprobs: list[Logprob] | None = None


class Logprobs(_EndpointReply):
    """The log-probabilities of a completion."""

    content: list[TokenLogprob] | None = None


class EndpointMessage(_EndpointReply):
    """The generated message."""

    content: str | None = None  # null if a reasoning model did not reach its answer


class EndpointChoice(_EndpointReply):
    """One choice of a completion."""

    message: EndpointMessage
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class EndpointCompletion(_EndpointReply):
    """A chat completion."""

    choices: Annotated[list[EndpointChoice], Field(min_length=1)]
    prompt_token_ids: Any = None  # of vLLM, where `return_token_ids` asks for them
    usage: Any = None  # only its prompt_tokens are read, so whatever else it is must not fail a request


class UnusableCompletion(Exception):
    """A well-formed completion without the requested content."""


def read_generation(choice: EndpointChoice) -> Generation:
    """The generated text with the log-probabilities of its tokens. Raises UnusableCompletion without them."""
    if choice.message.content is None:
        raise UnusableCompletion("a completion without text (content is null)")
    if choice.logprobs is None or choice.logprobs.content is None:
        raise UnusableCompletion(f"none; {LOGPROBS_REMEDY}")
    logps = tuple(round(_check_logprob(token.logprob), 6) for token in choice.logprobs.content)
    if choice.message.content and not logps:
        raise UnusableCompletion(f"text, but an empty list of them; {LOGPROBS_REMEDY}")
    if not all(map(math.isfinite, logps)):
        raise UnusableCompletion("a written token with probability 0")
    return Generation(choice.message.content.strip(), logps, cut_off=choice.finish_reason == "length")


def read_completion(completion: EndpointCompletion) -> Generation:
    """The first choice as read_generation reads it, with the length of the prompt if the endpoint counts tokens."""
    usage = completion.usage if isinstance(completion.usage, dict) else {}
    counted = usage.get("prompt_tokens")
    prompt_tokens = counted if isinstance(counted, int) else None
    return replace(read_generation(completion.choices[0]), prompt_tokens=prompt_tokens)


def read_yes_probability(choice: EndpointChoice, *, after_thinking: bool = False) -> JudgeReply:
    """P(yes) / (P(yes) + P(no)) at the answer's first token, and P(yes) + P(no) as the reply's mass.

    The sums are over every casing of yes and no, with or without a leading space, among the listed tokens; a missing
    token counts as 0. after_thinking: the answer begins after the thinking block, if there is one. No score if the mass
    is below MIN_YES_NO_MASS, and none if the model is about to think instead of answering. Raises UnusableCompletion
    without log-probabilities.
    """
    tokens = choice.logprobs.content if choice.logprobs is not None else None
    if not tokens:
        raise UnusableCompletion(f"none; {_JUDGE_REMEDY}")
    position = _find_answer(tokens) if after_thinking else 0
    if position is None:
        return JudgeReply(None, reason=_describe_missing_answer(choice))
    top = tokens[position].top_logprobs
    if not top:
        raise UnusableCompletion(f"none; {_JUDGE_REMEDY}")
    likeliest = max(top, key=lambda token: token.logprob)
    if not after_thinking and _begins_thinking(likeliest.token):
        return JudgeReply(
            None,
            reason=f"the reply begins with a thinking block ({likeliest.token.strip()}); set `thinking: off` or "
            "`thinking: skip` for this judge",
        )
    mass = {"yes": 0.0, "no": 0.0}  # "Yes", " yes" and "YES" are different tokens of one word
    for token in top:
        word = normalise_token(token.token)
        if word in mass:
            mass[word] += math.exp(_check_logprob(token.logprob))  # vLLM writes -9999 for minus infinity: 0
    total = mass["yes"] + mass["no"]
    shown = round(min(total, 1.0), 6)
    if total < MIN_YES_NO_MASS:
        return JudgeReply(None, reason=NO_PROBABILITY, mass=shown)
    return JudgeReply(round(mass["yes"] / total, 6), mass=shown)


def read_rating(choice: EndpointChoice) -> JudgeReply:
    """The written n/10 as n / 10; without a score if the answer holds no such rating, or two different ones."""
    text = choice.message.content
    score = None if text is None else parse_rating(text)
    if score is not None:
        return JudgeReply(score)
    if text is None or (choice.finish_reason == "length" and not strip_thinking(text)):
        return JudgeReply(None, reason=_describe_missing_answer(choice))
    shown = strip_thinking(text) or ""
    shown = shown if len(shown) <= _QUOTED_CHARS else shown[:_QUOTED_CHARS] + "…"
    return JudgeReply(None, reason=f"the reply is no rating n/10: {shown!r}")


def read_rubric(choice: EndpointChoice) -> JudgeReply:
    """The expected rating over the probabilities of its first token, or the written rating without probabilities.

    E[n] / 10 = sum_n P(n) n / sum_n P(n) / 10 over n = 0 ... 10, as G-Eval weights its scores (arXiv 2303.16634,
    equation 1).
    """
    written = read_rating(choice)
    if written.score is None or choice.logprobs is None or not choice.logprobs.content:
        return written
    expected = _expect_rating(choice.logprobs.content, int(written.score * 10 + 1e-6))
    return written if expected is None else JudgeReply(round(expected / 10, 6))


def parse_rating(text: str) -> float | None:
    """n / 10 for a text that holds one rating "n/10" after its thinking block, such as "**8/10**" or "8/10."."""
    answer = strip_thinking(text)
    ratings = {float(match[1]) for match in _RATING_PATTERN.finditer(answer or "")}
    if len(ratings) != 1 or max(ratings) > 10:
        return None
    return round(ratings.pop() / 10, 6)


def strip_thinking(text: str) -> str | None:
    """The text after the thinking block; None if a block begins and does not end."""
    for begin, end in _THINKING_MARKS:
        _, found, answer = text.rpartition(end)  # the template may have opened the block, so only its end is certain
        if found:
            return answer.strip()
        if text.lstrip().startswith(begin):
            return None
    return text.strip()


def normalise_token(token: str) -> str:
    """A token as a word: without the marks and spaces around it, casefolded."""
    return token.translate(_SPACE_MARKS).strip().casefold()


_JUDGE_REMEDY = f"{LOGPROBS_REMEDY}, or set `rating: true` for this judge to let it write n/10 instead"


def _begins_thinking(token: str) -> bool:
    word = normalise_token(token)
    return any(word == begin.casefold() for begin, _ in _THINKING_MARKS)


def _find_answer(tokens: Sequence[TokenLogprob]) -> int | None:
    """Index of the answer's first token: the first one with a letter or digit after the thinking block.

    None if there is no such token: the block did not end. Marks may be split into several tokens, so the text of the
    tokens is searched.
    """
    text = "".join(token.token for token in tokens)
    start = 0
    for begin, end in _THINKING_MARKS:
        if end in text:
            start = max(start, text.rindex(end) + len(end))
        elif text.lstrip().startswith(begin):
            return None
    offset = 0
    for index, token in enumerate(tokens):
        if offset >= start and token.token.translate(_SPACE_MARKS).strip(_MARKUP):
            return index
        offset += len(token.token)
    return None


def _describe_missing_answer(choice: EndpointChoice) -> str:
    if choice.finish_reason == "length":
        return "the reply was cut off before its answer; set `thinking: skip`, or raise its max_thinking_tokens"
    return "the reply has no answer after its thinking block"


def _expect_rating(tokens: Sequence[TokenLogprob], written: int) -> float | None:
    """E[n] at the position where the rating `written` begins; None without the probabilities of its tokens.

    With a tokenizer that splits numbers into digits, "1" may begin 1 or 10. At a written "1" the next position says
    which: P(10 | 1) = P("0"). Otherwise it counts as the end of the scale that is closer to what was written.
    """
    position = _find_answer(tokens)
    while position is not None and position < len(tokens) and not _is_rating(tokens[position].token):
        position += 1
    if position is None or position >= len(tokens) or not tokens[position].top_logprobs:
        return None
    if not str(written).startswith(normalise_token(tokens[position].token)):
        return None  # another number in the sentence, not the rating
    listed = dict.fromkeys(range(11), 0.0)
    for token in tokens[position].top_logprobs or ():
        if _is_rating(token.token):
            listed[int(normalise_token(token.token))] += math.exp(_check_logprob(token.logprob))
    if listed[10] == 0.0 and listed[1] > 0.0:
        listed[10] = listed[1] * _share_of_ten(tokens, position, written)
        listed[1] -= listed[10]
    total = sum(listed.values())
    return sum(number * mass for number, mass in listed.items()) / total if total >= MIN_YES_NO_MASS else None


def _is_rating(token: str) -> bool:
    word = normalise_token(token)
    return word.isascii() and word.isdigit() and int(word) <= 10


def _share_of_ten(tokens: Sequence[TokenLogprob], position: int, written: int) -> float:
    """P(10) / (P(1) + P(10)) where both begin with the token "1"."""
    follows = tokens[position + 1].top_logprobs if position + 1 < len(tokens) else None
    if normalise_token(tokens[position].token) != "1" or not follows:
        return 1.0 if written > 5 else 0.0
    share = sum(math.exp(_check_logprob(token.logprob)) for token in follows if normalise_token(token.token) == "0")
    return min(1.0, share)


def _check_logprob(logprob: float) -> float:
    if math.isnan(logprob) or logprob > 1e-3:  # rounding may lift the value of a certain token a little above 0
        raise UnusableCompletion(f"{logprob} as a log-probability; natural logarithms are never above 0")
    return logprob
