"""Chat completions for the endpoint tests, in the shape that vLLM and the OpenAI API give them.

Shapes: openai-python 3.57.0, types/chat/chat_completion.py; vLLM 0.32, entrypoints/openai/chat_completion/protocol.py.
`StandIn` adds what real servers do besides answering; each behaviour names where it comes from.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from clincot.models.endpoint import EndpointModel
from clincot.prompts import Conversation, Turn
from tests.support.http_server import Reply, Request, Server, serving

KEY = "sk-Zq3/9-secret"
MODELS = {"object": "list", "data": [{"id": "med-vlm", "object": "model"}]}


def asked(text: str) -> Conversation:
    return (Turn("user", text),)


def completion(text: str | None, top: dict[str, float] | None, *, tokens: list[float] | None = None) -> dict[str, Any]:
    """A chat completion; `top`: log-probabilities of the first token; `tokens`: of the tokens written."""
    logprobs: Any = None
    if top is not None:
        listed = [{"token": token, "logprob": value, "bytes": None} for token, value in top.items()]
        logprobs = {"content": [{"token": "?", "logprob": -0.1, "top_logprobs": listed}]}
    if tokens is not None:
        logprobs = {"content": [{"token": "?", "logprob": value, "top_logprobs": []} for value in tokens]}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


def written(tokens: Sequence[tuple[str, dict[str, float]]], *, text: str | None = "", finish: str = "stop") -> Any:
    """A completion of several tokens, each with the probabilities of its likeliest alternatives.

    text: the message; "" joins the tokens. A reasoning parser puts the thinking block elsewhere and leaves it in the
    log-probabilities (vLLM 0.32, `message.reasoning`).
    """
    content = []
    for token, probabilities in tokens:
        top = [{"token": other, "logprob": math.log(p) if p else -9999.0} for other, p in probabilities.items()]
        content.append({"token": token, "logprob": -0.1, "top_logprobs": top})
    message = "".join(token for token, _ in tokens) if text == "" else text
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": message},
        "logprobs": {"content": content},
        "finish_reason": finish,
    }
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


def chat(reply: Any) -> Any:
    """A handler that lists one model and answers every chat completion with `reply` (status 200)."""

    def handler(request: Request) -> Reply:
        return (200, MODELS) if request.path == "/v1/models" else (200, reply)

    return handler


def p_yes_of(server: Server, **options: Any) -> list[float | None]:
    return EndpointModel(f"{server.url}/v1", **options).p_yes([asked("Right?")])


def text_of(body: Any) -> str:
    """The text of a request's last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else str(content[-1]["text"])


def odds_for(text: str) -> float:
    """A probability between .1 and .9 that depends on the text only."""
    return 0.1 + 0.8 * int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF


@dataclass
class StandIn:
    """A server with the habits of real ones; P(yes) of a prompt is odds_for(its text).

    busy_503, limited_429, hanging: shares of the requests that get them, drawn from `seed`; at most one an item, so
    that every item can be scored. 503 is what a proxy sends while a pod restarts (Envoy's text); 429 with Retry-After
    is OpenAI's rate limit (API reference, "Rate limits") and RFC 9110, section 10.2.3; a hanging request is one to a
    pod that is killed behind a load balancer (NVIDIA/NeMo-Agent-Toolkit#842).
    latency_s: the time that an answer takes. retry_after: the header's value.
    always_failing: every request whose text contains it gets 500.
    dies_after: so many answered posts, then 503 for ever.
    scaled: log-probabilities are divided by the temperature (vLLM, --logprobs-mode processed_logprobs; for temperature
    0 every probability is 0 or 1: standardcompletions/rfcs#11).
    models: False has no list of models, like Azure's deployments, which answer 404.
    refuses: OpenAI's error for an option of reasoning models ("unsupported_parameter", "unsupported_value").
    """

    busy_503: float = 0.0
    limited_429: float = 0.0
    hanging: float = 0.0
    latency_s: float = 0.0
    retry_after: str = "0"
    always_failing: str = ""
    dies_after: int = 10**9
    scaled: bool = False
    models: bool = True
    refuses: tuple[str, ...] = ()
    seed: int = 0
    reply: Callable[[Any], Any] | None = None
    posts: list[Any] = field(default_factory=list)  # bodies in the order of arrival
    answered: int = 0
    tripped: set[str] = field(default_factory=set)  # texts that have failed once
    url: str = ""

    def __post_init__(self) -> None:
        self._draws = random.Random(self.seed)
        self._lock = threading.Lock()

    @contextmanager
    def serve(self) -> Iterator[StandIn]:
        with serving(self._handle) as server:
            self._server = server
            self.url = f"{server.url}/v1"
            yield self

    @property
    def requests(self) -> list[Request]:
        return self._server.requests

    def _handle(self, request: Request) -> Reply:
        if request.method == "GET":
            return (
                (200, MODELS) if self.models else (404, b'{"error": {"code": "404", "message": "Resource not found"}}')
            )
        body, text = request.body, text_of(request.body)
        with self._lock:
            self.posts.append(body)
            draw = self._draws.random()
            first = text not in self.tripped
            dead = self.answered >= self.dies_after
            refused = next((option for option in self.refuses if option in body), None)
            fails = first and draw < self.busy_503 + self.limited_429 + self.hanging
            if fails:
                self.tripped.add(text)
            elif not dead and refused is None:
                self.answered += 1
        if dead:
            return 503, b"no healthy upstream"
        if refused is not None:
            return 400, _refusal(refused)
        if self.always_failing and self.always_failing in text:
            return 500, b'{"error": "CUDA error: device-side assert triggered"}'
        if fails:
            return self._fail(draw)
        time.sleep(self.latency_s)
        return 200, self.reply(body) if self.reply else self._answer(body, text)

    def _fail(self, draw: float) -> Reply:
        if draw < self.busy_503:
            return 503, b"upstream connect error or disconnect/reset before headers"
        if draw < self.busy_503 + self.limited_429:
            error = {"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}}
            return 429, json.dumps(error).encode(), {"Retry-After": self.retry_after}
        self._server.hang()
        return 200, b""

    def _answer(self, body: Any, text: str) -> Any:
        yes = odds_for(text)
        if self.scaled and body.get("temperature", 1) == 0:
            return written([("yes", {"yes": 1.0, "no": 0.0} if yes > 0.5 else {"no": 1.0, "yes": 0.0})])
        return written([("yes", {"yes": yes * 0.96, "no": (1 - yes) * 0.96, "The": 0.04})])


def _refusal(option: str) -> bytes:
    """OpenAI's bodies for options that a reasoning model does not have."""
    messages = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) "
        "value is supported.",
        "logprobs": "You are not allowed to request logprobs from this model.",
    }
    error = {"message": messages[option], "type": "invalid_request_error", "param": option}
    return json.dumps({"error": error}).encode()
