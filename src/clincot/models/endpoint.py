"""An OpenAI-compatible chat-completions endpoint as policy and as judge.

Every conversation is one request; pictures travel as PNG data URIs. P(yes) is read from the log-probabilities of
the first token, so the endpoint has to return them: vLLM and the OpenAI API do, `transformers serve` does not. A
judge without them can be asked for a rating ("8/10") instead, and only when the configuration says so.

Who an endpoint is can only be known by asking it: `digest` names the model that /v1/models reports. Other weights
under the same name are not noticed.
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
_LEADING_SPACES = " \t\r\n▁Ġ"  # leading space as text, in SentencePiece and in byte-level BPE
_EXPECTED_LOGPROBS = "a chat completion with log-probabilities"
_LOGPROBS_REMEDY = "serve the model with something that returns them (vLLM does, `transformers serve` does not)"

T = TypeVar("T")
_ConversationWithOptions = tuple[Conversation, dict[str, Any]]  # with the options of its request


class _EndpointReply(BaseModel):
    """What endpoints add beyond the fields below is ignored; a number written as text is not a number."""

    model_config = ConfigDict(strict=True)


class _Logprob(_EndpointReply):
    token: str
    logprob: float


class _TokenLogprob(_Logprob):
    top_logprobs: list[_Logprob] | None = None


class _Logprobs(_EndpointReply):
    content: list[_TokenLogprob] | None = None


class _EndpointMessage(_EndpointReply):
    content: str | None = None  # null where a reasoning model did not come to its answer


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
    """Implements the Policy and the Judge protocol. Raises ModelFailed when any conversation's request failed.

    url: base address, …/v1. model: name there; "" takes the only one served. The key comes from the environment
    variable `api_key_env` or the file `api_key_file`. timeout_s: of each request, connecting included. At most
    `concurrency` requests are under way at once. rating: ask for "n/10" instead of reading log-probabilities.
    yes_no: ids of the tokens that mean yes or no (models/yes_no.py). vLLM is asked for these by name, however unlikely
    they are; who does not know its `logprob_token_ids` gives the 20 likeliest.
    """

    def __init__(
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
        """The id under which the endpoint serves the model; asked once, again after a failure."""
        asked, expected = f"{self.url}/models", "the list of served models"
        with self._open_client() as client:
            served = client.request_json("GET", asked, _ServedModels, expected=expected)
            names = [model.id for model in served.data]
            if self._model in names:
                return self._model
            if not self._model and len(names) == 1:
                return names[0]
            wanted = f"a model called {self._model!r}" if self._model else "one model, since none was named (`model`)"
            raise client.build_error(f"GET {asked}", wanted, f"{names}")

    @cached_property
    def digest(self) -> str:
        """Names the served model and how it is asked; raises ModelFailed when the endpoint cannot be asked."""
        wording = [hash_prompt(self.views), RATING_INSTRUCTION if self.rating else ""]
        return hash_json(["endpoint", self.model, self.name, wording])

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[Generation]:
        """See protocols.Policy. Whether log-probabilities are those of temperature 1, and whether the end of turn is
        among the tokens, is the endpoint's custom."""
        if len(seeds) != len(conversations):
            raise ValueError(f"one seed a conversation: {len(conversations)} conversations, {len(seeds)} seeds")
        options = {"max_tokens": max_new_tokens, "temperature": temperature, "logprobs": True}
        asked = [(c, {**options, "seed": seed}) for c, seed in zip(conversations, seeds, strict=True)]
        return self._request_each(asked, _EXPECTED_LOGPROBS, _read_generation)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) over every casing of yes and no among the 20 likeliest first tokens, each with or
        without a leading space; one that is not among them counts as 0. With `yes_no` over these tokens. None where
        they come to less than LEAST_YES_NO.

        With `rating`: the written n/10 as n / 10, None where something else was written.
        """
        if self.rating:
            options: dict[str, Any] = {"max_tokens": _MAX_RATING_TOKENS, "temperature": 0}
            return self._request_each(
                [(rating_prompt(c), options) for c in conversations], "a chat completion", _read_rating
            )
        options = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP_LOGPROBS, **self._named}
        return self._request_each([(c, options) for c in conversations], _EXPECTED_LOGPROBS, _read_yes_probability)

    def _request_each(
        self, asked: Sequence[_ConversationWithOptions], expected: str, read: Callable[[_EndpointChoice], T]
    ) -> list[T]:
        """What `read` makes of the reply to each conversation with its options, in order."""
        if not asked:
            return []
        model, address = self.model, f"{self.url}/chat/completions"

        def one(conversation_and_options: _ConversationWithOptions) -> T:
            conversation, options = conversation_and_options
            payload = {"model": model, "messages": build_messages(conversation), **options}
            completion = client.request_json("POST", address, _EndpointCompletion, expected=expected, payload=payload)
            try:
                return read(completion.choices[0])
            except _UnusableCompletion as error:
                raise client.build_error(f"POST {address} (model {model!r})", expected, str(error)) from None

        workers = min(self._concurrency, len(asked))
        with self._open_client(connections=workers) as client:
            return map_in_threads(one, asked, workers=workers)

    def _open_client(self, connections: int = 1) -> JsonClient:
        return JsonClient(timeout_s=self._timeout_s, key=self._key, connections=connections)


def build_endpoint_judge(spec: JudgeSpec, *, views: PromptFormat | None = None, concurrency: int = 8) -> EndpointModel:
    """The judge that params.yaml describes by its url. Raises ValueError when its key cannot be found."""
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
    """The conversation as the API's messages, the pictures of a turn before its text, as in-process models see it."""
    return [{"role": turn.role, "content": _build_content(turn)} for turn in conversation]


def _build_content(turn: Turn) -> str | list[dict[str, Any]]:
    if not turn.pictures:
        return turn.text
    pictures = [{"type": "image_url", "image_url": {"url": _encode_data_uri(picture)}} for picture in turn.pictures]
    return [*pictures, {"type": "text", "text": turn.text}] if turn.text else pictures


@lru_cache(maxsize=8)  # the candidates of a question show the same whole image, one after the other
def _encode_data_uri(picture: ImageView) -> str:
    return "data:image/png;base64," + encode_png_base64(
        load_cached_view(Path(picture.path), picture.box, picture.side_px)
    )


class _UnusableCompletion(Exception):
    """A well-formed completion that lacks what was asked for."""


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
    mass = {"yes": 0.0, "no": 0.0}
    for token in choice.logprobs.content[0].top_logprobs:
        word = token.token.lstrip(_LEADING_SPACES).lower()
        if word in mass:
            mass[word] += math.exp(_check_logprob(token.logprob))  # vLLM writes -9999 for minus infinity: 0
    total = mass["yes"] + mass["no"]
    return round(mass["yes"] / total, 6) if total >= MIN_YES_NO_MASS else None


def _check_logprob(logprob: float) -> float:
    if math.isnan(logprob) or logprob > 1e-3:  # rounding may lift a certain token's a little above 0
        raise _UnusableCompletion(f"{logprob} as a log-probability; natural logarithms are never above 0")
    return logprob


def _read_rating(choice: _EndpointChoice) -> float | None:
    found = _RATING_PATTERN.fullmatch(choice.message.content or "")
    if found is None or float(found[1]) > 10:
        return None
    return round(float(found[1]) / 10, 6)
