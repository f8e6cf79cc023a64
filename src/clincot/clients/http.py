"""JSON over HTTP for model endpoints: one request, one typed reply; every failure is a HttpFailure (a ModelFailed).

JsonClient sends a request once. RequestRetries waits for an endpoint that is away (waiting.py), and repeats a request
that failed although the endpoint is there, such as one answered with 500. API keys come from an
environment variable or a file and go into one header only; no message, log line or repr contains them. Addresses must
not contain credentials, because HTTP clients log addresses.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
from PIL import Image
from pydantic import BaseModel, ValidationError

from clincot.errors import InvalidInput, ModelFailed
from clincot.processes import retry_call
from clincot.waiting import (
    Outage,
    end_waits_on_interrupt,
    get_waiting,
    is_unknown_host,
    is_wrong_certificate,
    parse_retry_after,
)

MAX_REPLY_BYTES = 64 << 20  # fits masks of a few large images; far above any chat completion
_QUOTED_CHARS = 300  # characters of a reply that a message quotes
# Statuses that are worth another attempt, besides every 5xx; the list of the openai SDK (openai-python 3.57.0,
# src/openai/_base_client.py, `_should_retry`) and 425 (RFC 8470).
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})
# Statuses that say that the endpoint itself is away or overloaded, whatever is asked. 500 and 504 can be the fault of
# one request: a prompt that makes the model fail, or one that takes too long.
_AWAY_STATUSES = frozenset({429, 502, 503})
# Statuses that say that this client will not be served at all: no credit, a wrong key, a wrong address or model.
_FATAL_STATUSES = frozenset({401, 402, 403, 404})
_NO_CREDIT = "insufficient_quota"  # the code of OpenAI's 429 for an account without credit, which does not pass

# (time.monotonic() at which requests are given up, headers that are added to them) of the current context
_REQUEST_LIMITS: ContextVar[tuple[float, Mapping[str, str]]] = ContextVar("request_limits", default=(math.inf, {}))

KeyHeader = Literal["authorization", "api-key"]

A = TypeVar("A")
B = TypeVar("B")
M = TypeVar("M", bound=BaseModel)


class HttpFailure(ModelFailed):
    """A request without a usable reply.

    status: HTTP status; None if no complete reply came. timed_out: none came in time. transient: another attempt may
    succeed. away: the endpoint itself does not serve now. fatal: every further request would fail as well.
    retry_after_s: the wait that the server asked for. body: the start of the reply, for code that adapts to a server's
    refusals. summary: what came instead of a reply.
    """

    def __init__(  # noqa: PLR0913 (one keyword per fact that a caller may act on)
        self,
        message: str,
        *,
        status: int | None = None,
        timed_out: bool = False,
        transient: bool = False,
        away: bool = False,
        fatal: bool = False,
        retry_after_s: float | None = None,
        body: str = "",
        summary: str = "",
    ) -> None:
        super().__init__(message)
        self.status, self.timed_out = status, timed_out
        self.transient, self.away, self.fatal = transient or away, away, fatal
        self.retry_after_s, self.body, self.summary = retry_after_s, body, summary or message


@dataclass(frozen=True)
class RequestRetries:
    """When a failed request is sent again.

    An endpoint that is away is waited for (waiting.py), unless `waits` is false: a server that answers requests itself
    passes the failure on. A request that fails although its endpoint is
    there is sent again `retries` times: the n-th failure is followed by delay_s * 2^(n-1) seconds, at most max_delay_s,
    times a random factor from [1, 1.5).
    """

    retries: int = 0
    delay_s: float = 1.0
    max_delay_s: float = 30.0
    waits: bool = True
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False)
    draw: Callable[[], float] = field(default=random.random, compare=False)  # uniform on [0, 1)

    def call(
        self, service: str, request: Callable[[], B], on_retry: Callable[[HttpFailure, float], None] | None = None
    ) -> B:
        """Call `request` until it succeeds; raise the last HttpFailure, which is then neither transient nor away.

        service: address of the endpoint. on_retry: called before each wait between the `retries`.
        """

        def wait_for_endpoint() -> B:
            try:
                return get_waiting().call(service, request, _find_outage) if self.waits else request()
            except HttpFailure as error:
                if error.away:  # the time to wait is spent; later requests would fail, too, if none has succeeded
                    error.fatal = error.fatal or (self.waits and get_waiting().is_away(service))
                    error.away = error.transient = False
                raise

        return retry_call(
            wait_for_endpoint,
            is_transient=lambda error: isinstance(error, HttpFailure) and error.transient,
            wait_s=lambda failures: min(self.max_delay_s, self.delay_s * 2 ** (failures - 1)) * (1 + self.draw() / 2),
            attempts=self.retries + 1,
            on_retry=lambda error, delay_s: on_retry(error, delay_s) if on_retry else None,  # type: ignore[arg-type]
            sleep=self.sleep,
        )


def _find_outage(error: BaseException) -> Outage | None:
    if not (isinstance(error, HttpFailure) and error.away):
        return None
    return Outage(error.summary, error.retry_after_s)


NO_RETRIES = RequestRetries()
FAIL_AT_ONCE = RequestRetries(waits=False)


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


@contextmanager
def limit_requests(deadline: float, headers: Mapping[str, str]) -> Iterator[None]:
    """Give up requests of this block at a time of time.monotonic(), and add headers to them."""
    token = _REQUEST_LIMITS.set((deadline, headers))
    try:
        yield
    finally:
        _REQUEST_LIMITS.reset(token)


class JsonClient:
    """An HTTP client for JSON, to be used as a context manager. Threads may share it.

    key_header: `authorization` sends the key as a bearer token, `api-key` in the header of Azure OpenAI. query: added
    to every address, such as Azure's api-version.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        key: str = "",
        connections: int = 1,
        key_header: KeyHeader = "authorization",
        query: Mapping[str, str] | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._key = key
        headers = {"Accept": "application/json"}
        if key:
            headers |= {"Authorization": f"Bearer {key}"} if key_header == "authorization" else {"api-key": key}
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx.Client(timeout=timeout_s, headers=headers, limits=limits, params=dict(query or {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def request_json(
        self,
        method: str,
        url: str,
        reply: type[M],
        *,
        expected: str,
        payload: Any = None,
        timeout_s: float | None = None,
    ) -> M:
        """Send one request and parse its reply as `reply`. Raises HttpFailure.

        expected: a description of the expected reply, for the message. timeout_s: instead of the client's.
        """
        request = f"{method} {url}"
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            status, headers, body = self._send_request(method, url, payload, timeout_s)
        except httpx.TimeoutException as error:
            actual = f"no complete reply within {timeout_s:.3g} s"
            unconnected = isinstance(error, httpx.ConnectTimeout)
            raise self.build_error(
                request, expected, actual, transient=True, timed_out=True, away=unconnected, fatal=unconnected
            ) from None
        except httpx.HTTPError as error:
            actual, unconnected = f"no reply: {type(error).__name__}: {error}", isinstance(error, httpx.ConnectError)
            passes = not (is_unknown_host(error) or is_wrong_certificate(error))
            cut = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
            raise self.build_error(
                request, expected, actual, transient=passes, away=cut and passes, fatal=unconnected
            ) from None
        if status not in (200, 201):
            raise self._build_status_error(request, expected, status, headers, body)
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):  # not JSON or not UTF-8, a number of 5000 digits; nested too deeply
            actual = f"HTTP {status} with a body that is not JSON"  # perhaps the page of a proxy
            raise self.build_error(request, expected, actual, body, transient=True) from None
        try:
            return reply.model_validate(content)
        except ValidationError as error:
            items = error.errors(include_url=False, include_input=False, include_context=False)[:5]
            problems = [f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in items]
            raise self.build_error(request, expected, f"JSON of another shape ({'; '.join(problems)})", body) from None

    def build_error(
        self, request: str, expected: str, actual: str, body: bytes | None = None, **facts: Any
    ) -> HttpFailure:
        """Build the error of a request: request, expected and actual reply, in one line, without the key.

        facts: further fields of HttpFailure.
        """
        message = f"{request}: expected {expected}, got {self._redact_key(actual)}"
        shown = ""
        if body is not None:
            shown = self._redact_key(body[:MAX_REPLY_BYTES].decode("utf-8", errors="replace"))
            message += f": {shown[:_QUOTED_CHARS]!r}" + ("…" if len(shown) > _QUOTED_CHARS else "")
        return HttpFailure(message, body=shown, summary=self._redact_key(actual), **facts)

    def _build_status_error(
        self, request: str, expected: str, status: int, headers: httpx.Headers, body: bytes
    ) -> HttpFailure:
        no_credit = status == 429 and _NO_CREDIT.encode() in body
        wait = headers.get("retry-after") if status in (429, 503) else None
        facts: dict[str, Any] = {
            "status": status,
            "fatal": status in _FATAL_STATUSES or no_credit,
            "away": status in _AWAY_STATUSES and not no_credit,
            "transient": (status in _TRANSIENT_STATUSES or status >= 500) and not no_credit,
            "retry_after_s": parse_retry_after(wait) if wait else None,
        }
        if status == 401:  # the body is not quoted: it may contain parts of the key
            reason = "the key sent was not accepted" if self._key else "no key was sent; one is needed"
            return self.build_error(request, expected, f"HTTP {status}: {reason}", **facts)
        return self.build_error(request, expected, f"HTTP {status}", body, **facts)

    def _send_request(self, method: str, url: str, payload: Any, timeout_s: float) -> tuple[int, httpx.Headers, bytes]:
        """Return status, headers and body. The timeout covers the whole reply; httpx's own covers each read."""
        given_up_at, headers = _REQUEST_LIMITS.get()
        deadline = min(time.monotonic() + timeout_s, given_up_at)
        timeout, body = max(0.001, deadline - time.monotonic()), bytearray()
        with self._http.stream(method, url, json=payload, headers=headers, timeout=timeout) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_REPLY_BYTES:
                    raise httpx.DecodingError(f"the reply is larger than {MAX_REPLY_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the reply takes too long")
        return response.status_code, response.headers, bytes(body)

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
        futures = [pool.submit(copy_context().run, call, item) for item in items]
        try:
            with end_waits_on_interrupt():
                return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def encode_png_base64(image: Image.Image) -> str:
    """Encode an image as a PNG in base64. Level 1 compresses a 5-megapixel image in a fraction of a second."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
