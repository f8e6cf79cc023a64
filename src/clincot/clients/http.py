"""JSON over HTTP for the endpoints of models: one request, one typed reply, every failure a ModelFailed.

Nothing is retried here. Keys come from an environment variable or a file and go into one header; they appear in
no message, no log line and no representation. Addresses may not hold credentials, because HTTP clients log them.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from PIL import Image
from pydantic import BaseModel, ValidationError

from clincot.errors import InvalidInput, ModelFailed

MAX_REPLY_BYTES = 64 << 20  # a reply with masks of a few large films; far above any chat completion
_QUOTED_CHARS = 300  # characters of a reply that a message quotes

A = TypeVar("A")
B = TypeVar("B")
M = TypeVar("M", bound=BaseModel)


def validate_url(url: str, *, what: str) -> str:
    """`url` without a trailing slash; ValueError unless it is http(s) without credentials, query and fragment."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise InvalidInput(f"{what}: expected an address like http://127.0.0.1:8000/v1, got a malformed one") from None
    if "@" in url or parsed.query or parsed.fragment:  # what lies before an @ may parse as host or path
        raise InvalidInput(
            f"{what}: the address holds a user, password, query or fragment; addresses are logged, so name an "
            "environment variable or a file that holds the key instead"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidInput(f"{what}: expected an address like http://127.0.0.1:8000/v1, got {url!r}")
    return url.rstrip("/")


def read_api_key(*, env: str = "", file: Path | None = None, what: str) -> str:
    """The key held by an environment variable or a file, "" where neither is named; ValueError never quotes it."""
    if env and file is not None:
        raise InvalidInput(f"{what}: name an environment variable ({env}) or a file ({file}) for the key, not both")
    if file is not None:
        place = f"the file {file}"
        try:
            key = file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise InvalidInput(f"{what}: {place} should hold the key, but cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise InvalidInput(f"{what}: {place} should hold the key as text, but is not UTF-8") from None
    elif env:
        place = f"the environment variable {env}"
        key = os.environ.get(env, "").strip()
    else:
        return ""
    if not key:
        raise InvalidInput(
            f"{what}: {place} should hold the key, but is {'empty' if file or env in os.environ else 'unset'}"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):  # else the HTTP client quotes it in its error
        raise InvalidInput(f"{what}: {place} holds more than one word of printable ASCII; expected the key alone")
    return key


class JsonClient:
    """A context manager that exchanges JSON. One may be shared by threads."""

    def __init__(self, *, timeout_s: float, key: str = "", connections: int = 1) -> None:
        self._timeout_s = timeout_s
        self._key = key
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx.Client(timeout=timeout_s, headers=headers, limits=limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def request_json(self, method: str, url: str, reply: type[M], *, expected: str, payload: Any = None) -> M:
        """One request; its reply as `reply`. `expected` says in words what should come. Raises ModelFailed."""
        asked = f"{method} {url}"
        try:
            status, body = self._send_request(method, url, payload)
        except httpx.TimeoutException:
            raise self.build_error(asked, expected, f"no complete reply within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise self.build_error(asked, expected, f"no reply: {type(error).__name__}: {error}") from None
        if status == 401:  # such bodies quote parts of the key
            with_key = "the key sent was not accepted" if self._key else "no key was sent; one is needed"
            raise self.build_error(asked, expected, f"HTTP {status}: {with_key}")
        if status != 200:
            raise self.build_error(asked, expected, f"HTTP {status}", body)
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):  # not JSON, not UTF-8, a number of 5000 digits; nested without end
            raise self.build_error(asked, expected, "HTTP 200 with a body that is not JSON", body) from None
        try:
            return reply.model_validate(content)
        except ValidationError as error:
            places = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}"
                for e in error.errors(include_url=False, include_input=False, include_context=False)[:5]
            )
            raise self.build_error(asked, expected, f"JSON of another shape ({places})", body) from None

    def build_error(self, asked: str, expected: str, came: str, body: bytes | None = None) -> ModelFailed:
        """What was asked, expected and got, in one line, without the key."""
        message = f"{asked}: expected {expected}, got {self._redact_key(came)}"
        if body is not None:
            shown = self._redact_key(body[:MAX_REPLY_BYTES].decode("utf-8", errors="replace"))
            message += f": {shown[:_QUOTED_CHARS]!r}" + ("…" if len(shown) > _QUOTED_CHARS else "")
        return ModelFailed(message)

    def _send_request(self, method: str, url: str, payload: Any) -> tuple[int, bytes]:
        """Status and body. The deadline holds for the whole reply: httpx's own is for each piece of it."""
        deadline = time.monotonic() + self._timeout_s
        body = bytearray()
        with self._http.stream(method, url, json=payload) as response:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > MAX_REPLY_BYTES:
                    raise httpx.DecodingError(f"the reply is larger than {MAX_REPLY_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the reply takes too long")
        return response.status_code, bytes(body)

    def _redact_key(self, text: str) -> str:
        if not self._key:
            return text
        return text.replace(self._key, "[key]").replace(self._key.replace("/", "\\/"), "[key]")


def map_in_threads(call: Callable[[A], B], items: Sequence[A], *, workers: int) -> list[B]:
    """`call` of every item in at most `workers` threads, results in the items' order.

    The first failure *in that order* is raised, whichever came first in time; what has not started by then never
    starts.
    """
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def encode_png_base64(image: Image.Image) -> str:
    """The image as base64 of a PNG. Level 1: a 5-megapixel film takes a fraction of a second instead of seconds."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
