"""An OpenAI-compatible chat-completions endpoint as policy and as judge.

Every conversation is one request; pictures are sent as PNG data URIs. P(yes) is read from the log-probabilities of the
first token, so the endpoint must return them: vLLM and the OpenAI API do, `transformers serve` does not. A judge
without them can write a rating ("8/10") instead, if the configuration says so.

An endpoint's identity is what it reports: `digest` covers the model name. It does not notice other weights under the
same name.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field

from clincot.clients.adaptive_limit import AdaptiveLimit, ReplyPatience
from clincot.clients.http import (
    NO_RETRIES,
    HttpFailure,
    JsonClient,
    KeyHeader,
    RequestRetries,
    encode_png_base64,
    map_in_threads,
    read_api_key,
    validate_url,
)
from clincot.config import JudgeSpec
from clincot.images import load_cached_view
from clincot.models.chat_replies import (
    EndpointChoice,
    EndpointCompletion,
    UnusableCompletion,
    read_completion,
    read_rating,
    read_rubric,
    read_yes_probability,
)
from clincot.models.protocols import Generation, JudgeReply
from clincot.prompts import (
    RATING_INSTRUCTION,
    RUBRIC_INSTRUCTION,
    Conversation,
    ImageView,
    PromptFormat,
    Turn,
    hash_prompt,
    rating_prompt,
)
from clincot.records import hash_json

TOP_LOGPROBS = 20  # the most that the OpenAI API gives, and vLLM's default limit
_MAX_RATING_TOKENS = 16  # "10/10" in any tokenizer, and room to see that more was written
_EXPECTED_LOGPROBS = "a chat completion with log-probabilities"
_THREADS_PER_REQUEST = 2
_TOO_MANY_REQUESTS = 429
_MAX_STREAK = 16  # failed requests in a row, each after its retries, after which an endpoint is given up

# A list of models is not needed if the model is named. Azure lists base models and no deployments, LiteLLM's wildcard
# lists "*" (BerriAI/litellm#4903), restricted OpenAI keys get 403, and other gateways have no such route.
_NO_MODEL_LIST = frozenset({400, 403, 404, 405, 501})

T = TypeVar("T")
_ConversationWithOptions = tuple[Conversation, dict[str, Any]]  # with the options of its request


class _ServedModel(BaseModel):
    model_config = ConfigDict(strict=True)

    id: Annotated[str, Field(min_length=1)]


class _ServedModels(BaseModel):
    model_config = ConfigDict(strict=True)

    data: list[_ServedModel]


@dataclass(frozen=True)
class ChatOptions:
    """How an endpoint is asked, beyond its address and model.

    form: `yes_no` reads P(yes); `rating` reads a written n/10; `rubric` reads the expected n/10. thinking: `off` asks
    the chat template for no thinking block, `skip` reads the answer after it. temperature: 0, or 1 for a server that
    scales its log-probabilities by the temperature. text_only: pictures are not sent. key_header and api_version: how
    Azure OpenAI wants its key and version.
    """

    form: Literal["yes_no", "rating", "rubric"] = "yes_no"
    thinking: Literal["default", "off", "skip"] = "default"
    max_thinking_tokens: int = 2048
    temperature: float = 0.0
    text_only: bool = False
    key_header: KeyHeader = "authorization"
    api_version: str = ""

    @property
    def identity(self) -> list[Any]:
        """The options that change a score, without those at their defaults; [] keeps the digests of earlier runs."""
        defaults = asdict(ChatOptions())
        names = ("thinking", "max_thinking_tokens", "temperature", "text_only")
        changed = {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}
        return [changed] if changed else []


class EndpointModel:
    """Implements the Policy and the Judge protocol. Raises ModelFailed if the request of any conversation fails.

    url: base address, …/v1. model: name of the served model; "" takes the only one served. The key comes from the
    environment variable `api_key_env` or the file `api_key_file`. timeout_s: limit of each request, including the
    connection. concurrency: most requests in flight; `rate` sends fewer at a time if the endpoint refuses many. rating:
    ask for "n/10" instead of reading log-probabilities, the same as the form `rating` of `options`. yes_no: ids of the
    tokens that mean yes or no (models/yes_no.py). vLLM returns the log-probabilities of these (`logprob_token_ids`)
    however unlikely they are; an endpoint without that option returns the 20 likeliest tokens. retry: for all requests
    but those of `rate`.
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
        options: ChatOptions | None = None,
        retry: RequestRetries = NO_RETRIES,
    ) -> None:
        if concurrency < 1 or timeout_s <= 0:
            raise ValueError(f"expected concurrency >= 1 and timeout_s > 0, got {concurrency} and {timeout_s}")
        what = f"endpoint {name or model!r}"
        self.url = validate_url(url, what=what)
        self.name = name or model or httpx.URL(self.url).host
        self.views = views or PromptFormat()
        self.options = options or ChatOptions(form="rating" if rating else "yes_no")
        self._model = model
        self._key = read_api_key(env=api_key_env, file=api_key_file, what=what)
        self._timeout_s = timeout_s
        self._named = {"logprob_token_ids": list(yes_no)} if yes_no else {}
        self._concurrency = concurrency
        self._retry = retry
        self._served: list[str] | None = None  # as listed; None: not listed, or not asked yet
        self._streak = 0  # failed requests in a row
        self._lock = threading.Lock()
        self._limit = AdaptiveLimit(concurrency, f"endpoint {self.name!r}")
        self._patience = ReplyPatience(timeout_s)
        self._calls = itertools.count()  # of rate
        self._renamed: dict[str, str] = {}  # option -> the name that this server wants; "": it refuses the option

    @property
    def reads_probabilities(self) -> bool:
        """Whether its scores are probabilities of the words yes and no."""
        return self.options.form == "yes_no"

    @cached_property
    def model(self) -> str:
        """The id under which the endpoint serves the model; requested once, and again after a failure.

        A named model is used even if the endpoint does not list it, as long as the endpoint answers.
        """
        address, expected = f"{self.url}/models", "the list of served models"
        with self._open_client() as client:
            try:
                served = self._retry.call(
                    self.url, lambda: client.request_json("GET", address, _ServedModels, expected=expected)
                )
            except HttpFailure as error:
                malformed = error.status is None and error.body != ""  # a reply with status 200, but no list
                if self._model and (error.status in _NO_MODEL_LIST or malformed):
                    return self._model
                raise
            self._served = [model.id for model in served.data]
            if self._model:
                return self._model
            if len(self._served) == 1:
                return self._served[0]
            wanted = "one model, since none was named (`model`)"
            raise client.build_error(f"GET {address}", wanted, f"{self._served}", fatal=True)

    @cached_property
    def digest(self) -> str:
        """Identifies the served model and its prompts; raises ModelFailed if the endpoint does not answer."""
        instruction = {"yes_no": "", "rating": RATING_INSTRUCTION, "rubric": RUBRIC_INSTRUCTION}[self.options.form]
        prompts = [hash_prompt(self.views), instruction, *self.options.identity]
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
        if not requests:
            return []
        _ = self.model  # before the threads, so that it is requested once
        workers = min(self._concurrency, len(requests))
        with self._open_client(connections=workers) as client:

            def ask(request: _ConversationWithOptions) -> Generation:
                return self._retry.call(self.url, lambda: self._generate_one(client, *request))

            return map_in_threads(ask, requests, workers=workers)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) of the answer's first token; see protocols.Policy and chat_replies.

        The sums are over every casing of yes and no, with or without a leading space, among the 20 likeliest first
        tokens (or among the tokens of `yes_no`); a missing token counts as 0. None if both together have less than
        MIN_YES_NO_MASS.

        Of a judge that rates: the written n/10 as n / 10, or its expectation, and None if something else was written.
        """
        if not conversations:
            return []
        _ = self.model  # before the threads, so that it is requested once
        workers = min(self._concurrency, len(conversations))
        with self._open_client(connections=workers) as client:

            def rate(conversation: Conversation) -> JudgeReply:
                return self._retry.call(self.url, lambda: self._rate_one(client, conversation))

            replies = map_in_threads(rate, conversations, workers=workers)
        return [reply.score for reply in replies]

    def rate(
        self,
        conversations: Sequence[Conversation],
        *,
        retry: RequestRetries = NO_RETRIES,
        on_reply: Callable[[int, JudgeReply], None] | None = None,
        on_retry: Callable[[HttpFailure, float], None] | None = None,
    ) -> list[JudgeReply]:
        """Rate each conversation on its own: a request that fails costs its own score only.

        on_reply: called with the position of each reply as it comes, from several threads at once. Several calls may
        run at the same time; they share the limit of requests in flight, and the earlier call's requests go first.
        Raises ModelFailed if further requests would fail as well: the endpoint refuses connections, the key, the
        address or the model, or _MAX_STREAK requests in a row have failed, those of earlier calls included.
        """
        if not conversations:
            return []
        retry.call(self.url, lambda: self.model, on_retry)

        given_up: list[HttpFailure] = []
        call = next(self._calls)

        def rate_one(numbered: tuple[int, Conversation]) -> JudgeReply:
            position, conversation = numbered
            failures = 0

            def attempt() -> JudgeReply:
                nonlocal failures
                with self._limit.hold((call, position)):
                    if given_up:  # not sent: the caller learns of the failure when its turn comes
                        raise given_up[0]
                    timeout_s = self._patience.choose_timeout(failures, last=failures >= retry.retries)
                    try:
                        return self._time_request(client, conversation, timeout_s)
                    except HttpFailure as error:
                        failures += not error.away  # waits for an endpoint that is away are not counted as retries
                        raise

            try:
                reply = retry.call(self.url, attempt, on_retry)
                with self._lock:
                    self._streak = 0
            except HttpFailure as error:
                with self._lock:
                    self._streak += 1
                if error.fatal or self._streak >= _MAX_STREAK:
                    given_up.append(error)
                    raise
                reply = JudgeReply(None, reason=f"the request failed: {error}", failed=True)
            if on_reply is not None:
                on_reply(position, reply)
            return reply

        # A thread that waits before another attempt is not in flight, so there are more threads than requests.
        workers = min(_THREADS_PER_REQUEST * self._concurrency, len(conversations))
        with self._open_client(connections=workers) as client:
            return map_in_threads(rate_one, list(enumerate(conversations)), workers=workers)

    def _generate_one(self, client: JsonClient, conversation: Conversation, options: dict[str, Any]) -> Generation:
        return self._request_one(client, _EXPECTED_LOGPROBS, read_completion, (conversation, options))

    def _time_request(self, client: JsonClient, conversation: Conversation, timeout_s: float) -> JudgeReply:
        """Rate one conversation, and let the limits of this endpoint learn from the reply."""
        start = time.monotonic()
        try:
            reply = self._rate_one(client, conversation, timeout_s)
        except HttpFailure as error:
            self._limit.record_reply(refused=error.status == _TOO_MANY_REQUESTS)
            raise
        self._patience.add(time.monotonic() - start)
        self._limit.record_reply(refused=False)
        return reply

    def _rate_one(self, client: JsonClient, conversation: Conversation, timeout_s: float | None = None) -> JudgeReply:
        """Ask for the score of one conversation; timeout_s: instead of the endpoint's."""
        send = partial(self._request_one, client, timeout_s=timeout_s)
        options, form = self.options, self.options.form
        skip = options.thinking == "skip"
        tokens = (1 if form == "yes_no" else _MAX_RATING_TOKENS) + skip * options.max_thinking_tokens
        request: dict[str, Any] = {"max_tokens": tokens, "temperature": options.temperature or 0}
        if options.thinking == "off":  # vLLM and SGLang pass these on to the template; Qwen3's knows enable_thinking
            request["chat_template_kwargs"] = {"enable_thinking": False}
        if form == "rating":
            read = _read_first_choice(read_rating)
            return send("a chat completion", read, (rating_prompt(conversation), request))
        request |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if form == "rubric":
            asked = rating_prompt(conversation, RUBRIC_INSTRUCTION)
            return send("a chat completion", _read_first_choice(read_rubric), (asked, request))
        read = _read_first_choice(partial(read_yes_probability, after_thinking=skip))
        return send(_EXPECTED_LOGPROBS, read, (conversation, {**request, **self._named}))

    def _request_one(
        self,
        client: JsonClient,
        expected: str,
        read: Callable[[EndpointCompletion], T],
        conversation_and_options: _ConversationWithOptions,
        *,
        timeout_s: float | None = None,
    ) -> T:
        """Send one conversation with its options; return the reply as parsed by `read`. Raises HttpFailure."""
        conversation, options = conversation_and_options
        model, address = self.model, f"{self.url}/chat/completions"
        payload = {"model": model, "messages": build_messages(conversation, text_only=self.options.text_only)}
        while True:
            content = payload | self._rename_options(options)
            try:
                completion = client.request_json(
                    "POST", address, EndpointCompletion, expected=expected, payload=content, timeout_s=timeout_s
                )
                break
            except HttpFailure as error:
                if not self._adapt_to_refusal(error, content):
                    raise self._explain_unlisted(error) from None
        try:
            return read(completion)
        except UnusableCompletion as error:
            raise client.build_error(f"POST {address} (model {model!r})", expected, str(error)) from None

    def _rename_options(self, options: dict[str, Any]) -> dict[str, Any]:
        renamed = {self._renamed.get(name, name): value for name, value in options.items()}
        renamed.pop("", None)
        return renamed

    def _adapt_to_refusal(self, error: HttpFailure, sent: dict[str, Any]) -> bool:
        """Whether the request is worth sending again without the option that the server refused.

        OpenAI's reasoning models and Azure's refuse max_tokens ("Unsupported parameter: 'max_tokens' is not supported
        with this model. Use 'max_completion_tokens' instead.") and every temperature but their own ("Unsupported value:
        'temperature' does not support 0 with this model."); models without log-probabilities refuse them, and a rubric
        does not need them.
        """
        if error.status not in (400, 422):
            return False
        changes: dict[str, str] = {}
        if "max_completion_tokens" in error.body and "max_tokens" in sent:
            changes = {"max_tokens": "max_completion_tokens"}
        elif "'temperature'" in error.body and "temperature" in sent and "nsupported" in error.body:
            changes = {"temperature": ""}
        elif self.options.form == "rubric" and "logprobs" in error.body and "logprobs" in sent:
            changes = {"logprobs": "", "top_logprobs": ""}
        self._renamed |= changes
        return bool(changes)

    def _explain_unlisted(self, error: HttpFailure) -> HttpFailure:
        """A 404 for a model that the endpoint does not list names the listed ones."""
        if error.status != 404 or self._served is None or self.model in self._served:
            return error
        message = f"{error}; the endpoint lists {self._served}, not {self.model!r}"
        return HttpFailure(message, status=error.status, fatal=error.fatal, body=error.body)

    def _open_client(self, connections: int = 1) -> JsonClient:
        version = self.options.api_version
        return JsonClient(
            timeout_s=self._timeout_s,
            key=self._key,
            connections=connections,
            key_header=self.options.key_header,
            query={"api-version": version} if version else None,
        )


def _read_first_choice(read: Callable[[EndpointChoice], T]) -> Callable[[EndpointCompletion], T]:
    return lambda completion: read(completion.choices[0])


def build_endpoint_judge(spec: JudgeSpec, *, views: PromptFormat | None = None) -> EndpointModel:
    """The judge that the configuration describes by its url. Raises InvalidInput if its key cannot be found."""
    options = ChatOptions(
        form="rating" if spec.rating else spec.prompt,
        thinking=spec.thinking,
        max_thinking_tokens=spec.max_thinking_tokens,
        temperature=spec.temperature,
        text_only=spec.text_only,
        key_header=spec.api_key_header,
        api_version=spec.api_version,
    )
    return EndpointModel(
        spec.url,
        name=spec.name,
        model=spec.model,
        api_key_env=spec.api_key_env,
        timeout_s=spec.timeout_s,
        views=views,
        concurrency=spec.concurrency,
        options=options,
    )


def build_messages(conversation: Conversation, *, text_only: bool = False) -> list[dict[str, Any]]:
    """The conversation as API messages; as for models in this process, a turn's pictures come before its text.

    text_only: without the pictures.
    """
    return [{"role": turn.role, "content": _build_content(turn, text_only)} for turn in conversation]


def _build_content(turn: Turn, text_only: bool) -> str | list[dict[str, Any]]:
    if not turn.pictures or text_only:
        return turn.text
    pictures = [{"type": "image_url", "image_url": {"url": _encode_data_uri(picture)}} for picture in turn.pictures]
    return [*pictures, {"type": "text", "text": turn.text}] if turn.text else pictures


@lru_cache(maxsize=8)  # the candidates of a question are consecutive and show the same whole image
def _encode_data_uri(picture: ImageView) -> str:
    return "data:image/png;base64," + encode_png_base64(
        load_cached_view(Path(picture.path), picture.box, picture.side_px, picture.cutout)
    )
