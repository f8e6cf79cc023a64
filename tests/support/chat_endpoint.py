"""Chat completions for the endpoint tests, in the shape that vLLM and the OpenAI API give them."""

from __future__ import annotations

from typing import Any

from clincot.models.endpoint import EndpointModel
from clincot.prompts import Conversation, Turn
from tests.support.http_server import Reply, Request, Server

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


def chat(reply: Any) -> Any:
    """A handler that lists one model and answers every chat completion with `reply` (status 200)."""

    def handler(request: Request) -> Reply:
        return (200, MODELS) if request.path == "/v1/models" else (200, reply)

    return handler


def p_yes_of(server: Server, **options: Any) -> list[float | None]:
    return EndpointModel(f"{server.url}/v1", **options).p_yes([asked("Right?")])
