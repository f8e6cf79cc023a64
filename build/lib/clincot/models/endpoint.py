"""An OpenAI-compatible chat-completions endpoint as policy and as judge.

Every conversation is one request; pictures are sent as PNG data URIs. P(yes) is read from the log-probabilities of the
first token, so the endpoint must return them: vLLM and the OpenAI API do, `transformers serve` does not. A judge
without them can write a rating ("8/10") instead, if the configuration says so.

An endpoint's identity is what it reports: `digest` covers the model name from /v1/models. It does not notice other
weights under the same name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field

from clincot.clients.http import JsonClient, encode_png_base64, map_in_threads, read_api_key, validate_url
from clincot.config import JudgeSpec
from clincot.images import load_cached_view
from clincot.models.protocols import MIN_YES_NO_MASS, Generation
from clincot.prompts import RATING_INSTRUCTION, Conversation, ImageView, PromptFormat, Turn, hash_prompt, rating_prompt
from clincot.records import hash_json

TOP_LOGPROBS = 20  # the most that the OpenAI API gives, and vLLM's default limit
_MAX_RATING_TOKENS = 16  # "10/10" in any tokenizer, and room to see that more was written
_RATING_PATTERN = re.compile(r"\s*(\d{1,2}(?:\.\d+)?)\s*/\s*10\s*\.?\s*")
_LEADING_SPACES = " \t\r\n▁Ġ"  # a leading space as text, in SentencePiece and in byte-level BPE
_EXPECTED_LOGPROBS = "a chat completion with log-probabilities"
_LOGPROBS_REMEDY = "serve the model with something that returns them (vLLM does, `transformers serve` does not)"

T = TypeVar("T")
_ConversationWithOptions = tuple[Conversation, dict[str, Any]]  # with the options of its request


class _EndpointReply(BaseModel):
    """Part of a reply: additional fields are ignored, and a number written as text is refused."""

    model_config = ConfigDict(strict=True)


class _Logprob(_EndpointReply):
    token: str
    logprob: float


class _TokenLogprob(_Logprob):
    top_logprobs: list[_Logprob] | None = None


class _Logprobs(_EndpointReply):
    content: list[_TokenLogprob] | None = None


class _EndpointMessage(_EndpointReply):
    content: str | None = None  # null if a reasoning model did not reach its answer


class _EndpointChoice(_EndpointReply):
    message: _EndpointMessage
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _EndpointCompletion(_EndpointReply):
    choices: Annotated[list[_EndpointChoice], Field(min_length=1)]


class _ServedModel(_EndpointReply):
    id: Annotated[str, Field(min_length=1)]


class _ServedModels(_EndpointReply):
    data: list[_ServedModel]


class EndpointModel:
    """Implements the Policy and the Judge protocol. Raises ModelFailed if the request of any conversation fails.

    url: base address, …/v1. model: name of the served model; "" takes the only one served. The key comes from the
    environment variable `api_key_env` or the file `api_key_file`. timeout_s: limit of each request, including the
    connection. concurrency: most requests in flight. rating: ask for "n/10" instead of reading log-probabilities.
    yes_no: ids of the tokens that mean yes or no (models/yes_no.py). vLLM returns the log-probabilities of these
    (`logprob_token_ids`) however unlikely they are; an endpoint without that option returns the 20 likeliest tokens.
    """

    def __init__(  # noqa: PLR0913 (the fields of a judge's specification)
        self,
        url: str,
        *,
        name: str = "",
        model: str = "",
        api_key_env: str = "",
        api_key_file: Path | None = None,
        views: PromptFormat | None = None,
        rating: bool = False,
        timeout_s: float = 60.0,
        concurrency: int = 8,
        yes_no: Sequence[int] = (),
    ) -> None:
        if concurrency < 1 or timeout_s <= 0:
            raise ValueError(f"expected concurrency >= 1 and timeout_s > 0, got {concurrency} and {timeout_s}")
        what = f"endpoint {name or model!r}"
        self.url = validate_url(url, what=what)
        self.name = name or model or httpx.URL(self.url).host
        self.views = views or PromptFormat()
        self.rating = rating
        self._model = model
        self._key = read_api_key(env=api_key_env, file=api_key_file, what=what)
        self._timeout_s = timeout_s
        self._named = {"logprob_token_ids": list(yes_no)} if yes_no else {}
        self._concurrency = concurrency

    @cached_property
    def model(self) -> str:
        """The id under which the endpoint serves the model; requested once, and again after a failure."""
        address, expected = f"{self.url}/models", "the list of served models"
        with self._open_client() as client:
            served = client.request_json("GET", address, _ServedModels, expected=expected)
            names = [model.id for model in served.data]
            if self._model in names:
                return self._model
            if not self._model and len(names) == 1:
                return names[0]
            wanted = f"a model called {self._model!r}" if self._model else "one model, since none was named (`model`)"
            raise client.build_error(f"GET {address}", wanted, f"{names}")

    @cached_property
    def digest(self) -> str:
        """Identifies the served model and its prompts; raises ModelFailed if the endpoint does not answer."""
        prompts = [hash_prompt(self.views), RATING_INSTRUCTION if self.rating else ""]
        return hash_json(["endpoint", self.model, self.name, prompts])

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[Generation]:
        """See protocols.Policy.

        It depends on the endpoint whether the log-probabilities are those of temperature 1 and whether they include the
        end-of-turn token.
        """
        if len(seeds) != len(conversations):
            raise ValueError(
                f"expected one seed for each conversation, got {len(conversations)} conversations, {len(seeds)} seeds"
            )
        options = {"max_tokens": max_new_tokens, "temperature": temperature, "logprobs": True}
        requests = [
            (conversation, {**options, "seed": seed}) for conversation, seed in zip(conversations, seeds, strict=True)
        ]
        return self._request_each(requests, _EXPECTED_LOGPROBS, _read_generation)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) of the first token; see protocols.Policy.

        The sums are over every casing of yes and no, with or without a leading space, among the 20 likeliest first
        tokens (or among the tokens of `yes_no`); a missing token counts as 0. None if both together have less than
        MIN_YES_NO_MASS.

        With `rating`, the written n/10 as n / 10, and None if anything else was written.
        """
        if self.rating:
            options: dict[str, Any] = {"max_tokens": _MAX_RATING_TOKENS, "temperature": 0}
            requests = [(rating_prompt(conversation), options) for conversation in conversations]
            return self._request_each(requests, "a chat completion", _read_rating)
        options = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP_LOGPROBS, **self._named}
        requests = [(conversation, options) for conversation in conversations]
        return self._request_each(requests, _EXPECTED_LOGPROBS, _read_yes_probability)

    def _request_each(
        self, requests: Sequence[_ConversationWithOptions], expected: str, read: Callable[[_EndpointChoice], T]
    ) -> list[T]:
        """Send each conversation with its options; return the replies as parsed by `read`, in order."""
        if not requests:
            return []
        model, address = self.model, f"{self.url}/chat/completions"

        def send_request(conversation_and_options: _ConversationWithOptions) -> T:
            conversation, options = conversation_and_options
            payload = {"model": model, "messages": build_messages(conversation), **options}
            completion = client.request_json("POST", address, _EndpointCompletion, expected=expected, payload=payload)
            try:
                return read(completion.choices[0])
            except _UnusableCompletion as error:
                raise client.build_error(f"POST {address} (model {model!r})", expected, str(error)) from None

        workers = min(self._concurrency, len(requests))
        with self._open_client(connections=workers) as client:
            return map_in_threads(send_request, requests, workers=workers)

    def _open_client(self, connections: int = 1) -> JsonClient:
        return JsonClient(timeout_s=self._timeout_s, key=self._key, connections=connections)


def build_endpoint_judge(spec: JudgeSpec, *, views: PromptFormat | None = None, concurrency: int = 8) -> EndpointModel:
    """The judge that the configuration describes by its url. Raises InvalidInput if its key cannot be found."""
    return EndpointModel(
        spec.url,
        name=spec.name,
        model=spec.model,
        api_key_env=spec.api_key_env,
        rating=spec.rating,
        timeout_s=spec.timeout_s,
        views=views,
        concurrency=concurrency,
    )


def build_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as API messages; as for models in this process, a turn's pictures come before its text."""
    return [{"role": turn.role, "content": _build_content(turn)} for turn in conversation]


def _build_content(turn: Turn) -> str | list[dict[str, Any]]:
    if not turn.pictures:
        return turn.text
    pictures = [{"type": "image_url", "image_url": {"url": _encode_data_uri(picture)}} for picture in turn.pictures]
    return [*pictures, {"type": "text", "text": turn.text}] if turn.text else pictures


@lru_cache(maxsize=8)  # the candidates of a question are consecutive and show the same whole image
def _encode_data_uri(picture: ImageView) -> str:
    return "data:image/png;base64," + encode_png_base64(
        load_cached_view(Path(picture.path), picture.box, picture.side_px)
    )


class _UnusableCompletion(Exception):
    """A well-formed completion without the requested content."""


def _read_generation(choice: _EndpointChoice) -> Generation:
    if choice.message.content is None:
        raise _UnusableCompletion("a completion without text (content is null)")
    if choice.logprobs is None or choice.logprobs.content is None:
        raise _UnusableCompletion(f"none; {_LOGPROBS_REMEDY}")
    logps = tuple(round(_check_logprob(token.logprob), 6) for token in choice.logprobs.content)
    if choice.message.content and not logps:
        raise _UnusableCompletion(f"text, but an empty list of them; {_LOGPROBS_REMEDY}")
    if not all(map(math.isfinite, logps)):
        raise _UnusableCompletion("a written token with probability 0")
    return Generation(choice.message.content.strip(), logps, cut_off=choice.finish_reason == "length")


def _read_yes_probability(choice: _EndpointChoice) -> float | None:
    if choice.logprobs is None or not choice.logprobs.content or not choice.logprobs.content[0].top_logprobs:
        raise _UnusableCompletion(
            f"none; {_LOGPROBS_REMEDY}, or set `rating: true` for this judge to let it write n/10 instead"
        )
    # "Yes", " yes" and "YES" are different tokens of one word
    mass = {"yes": 0.0, "no": 0.0}
    for token in choice.logprobs.content[0].top_logprobs:
        word = token.token.lstrip(_LEADING_SPACES).lower()
        if word in mass:
            mass[word] += math.exp(_check_logprob(token.logprob))  # vLLM writes -9999 for minus infinity: 0
    total = mass["yes"] + mass["no"]
    return round(mass["yes"] / total, 6) if total >= MIN_YES_NO_MASS else None


def _check_logprob(logprob: float) -> float:
    if math.isnan(logprob) or logprob > 1e-3:  # rounding may lift the value of a certain token a little above 0
        raise _UnusableCompletion(f"{logprob} as a log-probability; natural logarithms are never above 0")
    return logprob


def _read_rating(choice: _EndpointChoice) -> float | None:
    match = _RATING_PATTERN.fullmatch(choice.message.content or "")
    if match is None or float(match[1]) > 10:
        return None
    return round(float(match[1]) / 10, 6)
