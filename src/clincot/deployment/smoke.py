"""The smoke test of a server.

The server must answer golden questions as the published checkpoint did. Both the answer and the region must match. The
questions are sent as OpenAI chat completions, like any client's.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from clincot.clients.http import read_api_key
from clincot.config import DeployConfig
from clincot.errors import InvalidInput, UserError
from clincot.geometry import Box, compute_iou
from clincot.jsonl import format_validation_error
from clincot.registry.manifest import GoldenQuestion, Manifest, build_checkpoint_key
from clincot.storage.store import Store

SMOKE_KEY_ENV = "CLINCOT_SMOKE_KEY"
CHAT_PATH = "/openai/v1/chat/completions"


class RequestFailed(UserError, RuntimeError):
    """A request was refused, timed out, failed, or returned something unusable. `status` is HTTP's, or 0."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class SmokeFailed(UserError, RuntimeError):
    """The new revision answers golden questions differently; the message names them."""


class RevisionClient(Protocol):
    """A client that sends requests to one revision."""

    def post_request(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        """POST the payload and return the reply's JSON. Raises RequestFailed."""
        ...

    @property
    def model(self) -> str:
        """The model's name at the server."""
        ...


class EndpointClient(RevisionClient, Protocol):
    """A client that sends requests to the address that users' clients use, and to one revision."""

    def post_to_endpoint(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        """POST the payload to the users' address and return the reply's JSON. Raises RequestFailed."""
        ...


class _SmokeRegion(BaseModel):
    box: Box
    answer: str = ""


class _SmokeChain(BaseModel):
    """The part of the completion's extension `clincot` that the smoke test reads."""

    model_config = ConfigDict(extra="ignore")

    answer: str = ""
    abstained: bool = False
    regions: tuple[_SmokeRegion, ...] = ()
    winner: int = 0
    settings: str = ""
    policy: str = ""


class _SmokeMessage(BaseModel):
    content: str | None


class _SmokeChoice(BaseModel):
    message: _SmokeMessage


class _SmokeCompletion(BaseModel):
    choices: tuple[_SmokeChoice, ...]
    clincot: _SmokeChain = _SmokeChain()


@dataclass(frozen=True)
class SmokeReply:
    """The answer of a server and the region that it came from."""

    answer: str
    box: Box | None  # of the winning region; None if the server reports none
    settings: str = ""  # digest of the settings that decided the answer; "" if the server reports none
    policy: str = ""  # digest of the checkpoint; "" if the server reports none


def build_smoke_headers() -> dict[str, str]:
    """The Authorization header of smoke requests, if $CLINCOT_SMOKE_KEY is set."""
    key = read_api_key(env=SMOKE_KEY_ENV, what="smoke requests") if SMOKE_KEY_ENV in os.environ else ""
    return {"Authorization": f"Bearer {key}"} if key else {}


def post_json(url: str, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
    """POST to a server by its own address and return the reply's JSON.

    Raises RequestFailed.
    """
    try:
        reply = httpx.post(url.rstrip("/") + path, json=dict(payload), headers=build_smoke_headers(), timeout=timeout_s)
        reply.raise_for_status()
        return reply.json()
    except httpx.HTTPStatusError as error:
        raise RequestFailed(f"POST {path}: {error}", error.response.status_code) from None
    except (httpx.HTTPError, ValueError) as error:
        raise RequestFailed(f"POST {path}: {type(error).__name__}: {error}") from None


def get_text(url: str, path: str, timeout_s: float) -> str:
    """GET a text from a server by its own address. Raises RequestFailed."""
    try:
        reply = httpx.get(url.rstrip("/") + path, headers=build_smoke_headers(), timeout=timeout_s)
        reply.raise_for_status()
    except httpx.HTTPError as error:
        raise RequestFailed(f"GET {path}: {type(error).__name__}: {error}") from None
    return reply.text


def ask_golden_question(
    server: RevisionClient, golden: GoldenQuestion, image: bytes, settings: DeployConfig
) -> SmokeReply:
    """Ask a revision one golden question with greedy decoding. Raises RequestFailed."""
    return _read_reply(server.post_request(CHAT_PATH, _build_request(server.model, golden, image), settings.request_s))


def _build_request(model: str, golden: GoldenQuestion, image: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(image).decode("ascii")
    return {
        "model": model,
        "temperature": 0,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": golden.question},
                ],
            }
        ],
    }


def _read_reply(body: Any) -> SmokeReply:
    try:
        completion = _SmokeCompletion.model_validate(body)
    except ValidationError as error:
        raise RequestFailed(f"POST {CHAT_PATH}: expected a chat completion: {format_validation_error(error)}") from None
    chain = completion.clincot
    content = completion.choices[0].message.content if completion.choices else None
    if chain.abstained:
        content = chain.answer  # the withheld answer; the message contains what the server's settings say
    if content is None:
        raise RequestFailed(f"POST {CHAT_PATH}: expected a completion with an answer, got one without")
    box = chain.regions[chain.winner].box if 0 <= chain.winner < len(chain.regions) else None
    return SmokeReply(content, box, chain.settings, chain.policy)


def describe_mismatch(golden: GoldenQuestion, reply: SmokeReply, settings: DeployConfig) -> str:
    """Describe how the reply differs from the golden answer; "" if it matches.

    The description contains the question's id, not its text.
    """
    if reply.answer.strip().casefold() != golden.answer.strip().casefold():
        return f"{golden.id}: expected the answer {golden.answer!r}, got {reply.answer[:80]!r}"
    if golden.box is None:
        return ""
    if reply.box is None:
        return f"{golden.id}: expected a region at {golden.box.xyxy}, got none"
    overlap = compute_iou(golden.box, reply.box)
    if overlap < settings.smoke_iou:
        return f"{golden.id}: expected a region at {golden.box.xyxy}, got {reply.box.xyxy} (IoU {overlap:.2f})"
    return ""


def read_golden_images(store: Store, manifest: Manifest) -> dict[str, bytes]:
    """Read the images of the golden and the served questions, by the question's id.

    Raises InvalidInput if the checkpoint was published without golden questions.
    """
    if not manifest.golden:
        raise InvalidInput(
            f"{manifest.line} {manifest.sha256[:12]} was published without golden questions, so a rollout cannot be "
            "checked; publish with questions that it answers clearly (--golden, publish.golden above 0)"
        )
    folder = build_checkpoint_key(manifest.line, manifest.sha256)
    questions = (*manifest.golden, *manifest.served)
    return {golden.id: store.read(f"{folder}/{golden.image}").content for golden in questions}


def run_smoke_test(
    server: RevisionClient, manifest: Manifest, images: Mapping[str, bytes], settings: DeployConfig
) -> str:
    """Ask all golden questions and return a summary.

    Every answer must match: golden questions are chosen among those whose answer leads clearly. Raises SmokeFailed.
    """
    misses = []
    for golden in manifest.golden:
        try:
            reply = ask_golden_question(server, golden, images[golden.id], settings)
            problem = describe_mismatch(golden, reply, settings)
        except RequestFailed as error:
            problem = f"{golden.id}: {error}"
        if problem:
            misses.append(problem)
    if misses:
        raise SmokeFailed(f"{len(misses)} of {len(manifest.golden)} golden questions missed: " + "; ".join(misses[:3]))
    return f"{len(manifest.golden)} of {len(manifest.golden)} golden questions met"


def check_served_answers(
    endpoint: EndpointClient, manifest: Manifest, images: Mapping[str, bytes], settings: DeployConfig
) -> str:
    """Ask the benchmark's served questions through the clients' address and return a summary.

    Answers, regions and serve settings must be those that the gate measured. The checkpoint must be the one that the
    revision reports when it is asked itself, so an address that still leads elsewhere is found although another
    checkpoint may give the same answers. Raises SmokeFailed.
    """
    first = manifest.served[0]
    try:
        own = ask_golden_question(endpoint, first, images[first.id], settings)
    except RequestFailed as error:
        raise SmokeFailed(f"the new revision does not answer the benchmark question {first.id}: {error}") from None
    expected = "" if manifest.serve is None else manifest.serve.answer_digest
    problems = []
    for question in manifest.served:
        payload = _build_request(endpoint.model, question, images[question.id])
        try:
            reply = _read_reply(endpoint.post_to_endpoint(CHAT_PATH, payload, settings.request_s))
        except RequestFailed as error:
            problems.append(f"{question.id}: {error}")
            continue
        problem = describe_mismatch(question, reply, settings)
        if not problem and expected and reply.settings not in ("", expected):
            problem = f"{question.id}: expected the serve settings {expected}, got {reply.settings}"
        if not problem and reply.policy != own.policy:
            problem = f"{question.id}: expected the checkpoint {own.policy[:12]}, got {reply.policy[:12] or 'none'}"
        if problem:
            problems.append(problem)
    if problems:
        raise SmokeFailed(
            f"{len(problems)} of {len(manifest.served)} benchmark questions were not answered as the gate measured: "
            + "; ".join(problems[:3])
        )
    return f"{len(manifest.served)} benchmark questions answered through the endpoint as the gate measured"
