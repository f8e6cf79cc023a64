"""JSON over HTTP for model endpoints: one request, one typed reply; every failure is a ModelFailed.

This module does not retry. API keys come from an environment variable or a file and go into one header only; no
message, log line or repr contains them. Addresses must not contain credentials, because HTTP clients log addresses.
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

MAX_REPLY_BYTES = 64 << 20  # fits masks of a few large images; far above any chat completion
_QUOTED_CHARS = 300  # characters of a reply that a message quotes

A = TypeVar("A")
B = TypeVar("B")
M = TypeVar("M", bound=BaseModel)


def validate_url(url: str, *, what: str) -> str:
    """Return `url` without a trailing slash. Raises InvalidInput unless it is http(s) and holds no credentials.

    Query and fragment are rejected as well. `what` names the setting in the message.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise InvalidInput(f"{what}: expected an address like http://127.0.0.1:8000/v1, got a malformed one") from None
    if "@" in url or parsed.query or parsed.fragment:  # text before an @ may be parsed as host or path
        raise InvalidInput(
            f"{what}: the address contains a user, password, query or fragment; addresses are logged, so name an "
            "environment variable or a file that holds the key instead"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidInput(f"{what}: expected an address like http://127.0.0.1:8000/v1, got {url!r}")
    return url.rstrip("/")


def read_api_key(*, env: str = "", file: Path | None = None, what: str) -> str:
    """Read an API key from an environment variable or a file; return "" if neither is named.

    Raises InvalidInput if the key is missing or malformed. The message never quotes the key.
    """
    if env and file is not None:
        raise InvalidInput(f"{what}: name an environment variable ({env}) or a file ({file}) for the key, not both")
    if file is not None:
        source = f"the file {file}"
        try:
            key = file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise InvalidInput(f"{what}: {source} should hold the key, but cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise InvalidInput(f"{what}: {source} should hold the key as text, but is not UTF-8") from None
    elif env:
        source = f"the environment variable {env}"
        key = os.environ.get(env, "").strip()
    else:
        return ""
    if not key:
        raise InvalidInput(
            f"{what}: {source} should hold the key, but is {'empty' if file or env in os.environ else 'unset'}"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):  # the HTTP client would quote it in its error
        raise InvalidInput(f"{what}: {source} holds more than one word of printable ASCII; expected only the key")
    return key


class JsonClient:
    """An HTTP client for JSON, to be used as a context manager. Threads may share it."""

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
        """Send one request and parse its reply as `reply`. Raises ModelFailed.

        expected: a description of the expected reply, for the message.
        """
        request = f"{method} {url}"
        try:
            status, body = self._send_request(method, url, payload)
        except httpx.TimeoutException:
            raise self.build_error(request, expected, f"no complete reply within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise self.build_error(request, expected, f"no reply: {type(error).__name__}: {error}") from None
        if status == 401:  # the body is not quoted: it may contain parts of the key
            reason = "the key sent was not accepted" if self._key else "no key was sent; one is needed"
            raise self.build_error(request, expected, f"HTTP {status}: {reason}")
        if status != 200:
            raise self.build_error(request, expected, f"HTTP {status}", body)
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):  # not JSON or not UTF-8, a number of 5000 digits; nested too deeply
            raise self.build_error(request, expected, "HTTP 200 with a body that is not JSON", body) from None
        try:
            return reply.model_validate(content)
        except ValidationError as error:
            items = error.errors(include_url=False, include_input=False, include_context=False)[:5]
            problems = [f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in items]
            raise self.build_error(request, expected, f"JSON of another shape ({'; '.join(problems)})", body) from None

    def build_error(self, request: str, expected: str, actual: str, body: bytes | None = None) -> ModelFailed:
        """Build the error of a request: request, expected and actual reply, in one line, without the key."""
        message = f"{request}: expected {expected}, got {self._redact_key(actual)}"
        if body is not None:
            shown = self._redact_key(body[:MAX_REPLY_BYTES].decode("utf-8", errors="replace"))
            message += f": {shown[:_QUOTED_CHARS]!r}" + ("…" if len(shown) > _QUOTED_CHARS else "")
        return ModelFailed(message)

    def _send_request(self, method: str, url: str, payload: Any) -> tuple[int, bytes]:
        """Return status and body. The timeout covers the whole reply; httpx's own covers each read."""
        deadline = time.monotonic() + self._timeout_s
        body = bytearray()
        with self._http.stream(method, url, json=payload) as response:
            for chunk in response.iter_bytes():
                body += chunk
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
    """Call `call` for every item in at most `workers` threads; return the results in the order of the items.

    Raises the error of the first failed item *in that order*, not in time. Calls that have not started by then are
    cancelled.
    """
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def encode_png_base64(image: Image.Image) -> str:
    """Encode an image as a PNG in base64. Level 1 compresses a 5-megapixel image in a fraction of a second."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
