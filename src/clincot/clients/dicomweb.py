"""A client of DICOMweb: QIDO-RS to search and WADO-RS to retrieve instances [DICOM PS3.18 10.4 and 10.6].

Searches are read page by page, and instances are retrieved one by one into files, in the encoding in which the server
stores them. Neither addresses below the server's root nor replies are quoted or logged, because they contain
identifiers of patients; messages name the root, and what was searched or retrieved by a number.

The Python package dicomweb-client (0.61) is not used: it sets no timeouts, does not read Retry-After, and keeps whole
replies in memory without a limit (dicomweb_client/web.py, `_http_get` and `_decode_multipart_message`).
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self
from urllib.parse import quote, urlencode

import httpx

from clincot.clients.http import HttpFailure, RequestRetries, read_api_key, validate_url
from clincot.errors import InvalidInput
from clincot.waiting import is_passing_status, is_unknown_host, is_wrong_certificate, parse_retry_after

STUDY_UID, SERIES_UID, INSTANCE_UID, MODALITY = "0020000D", "0020000E", "00080018", "00080060"
MAX_PAGE_BYTES = 64 << 20  # of a page of a search
_MULTIPART_OVERHEAD = 64 << 10  # boundaries and headers around a retrieved instance
_SLOWEST_BYTES_S = 10_000  # slower replies are given up once they took longer than the timeout
_SEARCH_TYPE = "application/dicom+json"
# As stored, so that the server neither decompresses nor recompresses; "*" is the standard's word for it.
_RETRIEVE_TYPE = 'multipart/related; type="application/dicom"; transfer-syntax=*'
# Characters of a query that need no percent-encoding [RFC 3986 3.4]. Orthanc (1.10.1, DICOMweb 1.7) does not decode the
# wildcards "%2A" and "%3F", and then finds nothing.
_UNQUOTED = "*?-/,:;@!$'()"
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")

Level = Literal["study", "series", "instance"]
_LEVEL_UIDS: dict[Level, str] = {"study": STUDY_UID, "series": SERIES_UID, "instance": INSTANCE_UID}
SearchItem = Mapping[str, Any]  # an object of the DICOM JSON model: {"0020000D": {"vr": "UI", "Value": [...]}}


class UnusableInstance(InvalidInput):
    """An instance that the server lists but cannot be had; the message states the reason and identifies nobody."""


@dataclass(frozen=True)
class DicomWebAccess:
    """How to reach a server. `auth_header`: value of the header Authorization, "" for none; it is never shown."""

    url: str
    auth_header: str = field(default="", repr=False)
    ca_file: Path | None = None  # PEM; only certificates that it vouches for are accepted then
    timeout_s: float = 60.0
    page_size: int = 200
    connections: int = 4


@dataclass(frozen=True)
class InstanceAddress:
    """The three UIDs that name an instance."""

    study: str
    series: str
    instance: str


def read_auth_header(*, token_env: str = "", basic_env: str = "") -> str:
    """Build the header from an environment variable: of a bearer token, or of USER:PASSWORD; "" if none is named.

    Raises InvalidInput, without quoting the value, if it is missing or malformed.
    """
    if token_env and basic_env:
        raise InvalidInput(f"name a variable with a token ({token_env}) or with USER:PASSWORD ({basic_env}), not both")
    if not basic_env:
        token = read_api_key(env=token_env, what="DICOMweb")
        return f"Bearer {token}" if token else ""
    user, colon, password = os.environ.get(basic_env, "").strip("\r\n").partition(":")
    if not (user and colon and password and (user + password).isprintable()):
        found = "something else" if os.environ.get(basic_env) else "nothing"
        raise InvalidInput(f"DICOMweb: the environment variable {basic_env} should hold USER:PASSWORD, got {found}")
    request = httpx.Request("GET", "http://localhost")
    return next(httpx.BasicAuth(user, password).auth_flow(request)).headers["Authorization"]


class DicomWebClient:
    """Searches and retrieves from one server; a context manager that threads may share."""

    def __init__(self, access: DicomWebAccess, retries: RequestRetries | None = None) -> None:
        self._access, self._retries = access, retries or RequestRetries(retries=3)
        self.url = validate_url(access.url, what="DICOMweb")
        if access.timeout_s <= 0 or access.page_size < 1 or access.connections < 1:
            raise InvalidInput(f"expected a timeout, a page size and connections above 0, got {access}")
        headers = {"Authorization": access.auth_header} if access.auth_header else {}
        limits = httpx.Limits(max_connections=access.connections, max_keepalive_connections=access.connections)
        self._http = httpx.Client(
            timeout=access.timeout_s, headers=headers, limits=limits, verify=_build_tls_context(access.ca_file)
        )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(_silence_http_log())
            stack.enter_context(self._http)
            self._open_parts = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open_parts.close()

    def search(
        self, level: Level, within: Sequence[str], query: Sequence[tuple[str, str]] = (), *, what: str
    ) -> Iterator[SearchItem]:
        """Yield every match once, whatever the sizes of the server's pages.

        within: UIDs of the study, or of study and series, that is searched; none: the whole server. what: describes
        the search in messages. Raises HttpFailure.
        """
        path = "".join(f"/{name}/{uid}" for name, uid in zip(("studies", "series"), within, strict=False))
        path += {"study": "/studies", "series": "/series", "instance": "/instances"}[level]
        seen, sizes = set[str](), list[int]()
        while True:
            at = [("limit", str(self._access.page_size)), ("offset", str(sum(sizes)))]
            page = self._read_page(path, [*query, *at], f"{what}, page {len(sizes) + 1}")
            fresh = []
            for item in page:
                uid = read_uid(item, _LEVEL_UIDS[level], self.url)
                if uid not in seen:
                    seen.add(uid)
                    fresh.append(item)
            if not fresh:
                self._check_is_end(page, sizes, what)
                return
            yield from fresh
            sizes.append(len(page))

    def _check_is_end(self, page: Sequence[SearchItem], sizes: Sequence[int], what: str) -> None:
        """Raise if a page that repeats earlier ones does not prove that the list is complete.

        A server that ignores `offset` sends its first page again. Its list is complete if that page was not cut at
        `limit`, or if the server ignores `limit` as well.
        """
        if page and sizes and sizes[0] == self._access.page_size:
            raise HttpFailure(
                f"{self.url}: {what}: expected page {len(sizes) + 1}, got results of earlier pages again. The server"
                f" does not page, so its list may be cut off; pass a --page-size above {sizes[0]}",
                fatal=True,
            )

    def _read_page(self, path: str, query: list[tuple[str, str]], what: str) -> list[SearchItem]:
        def request() -> list[SearchItem]:
            with self._open(path, _SEARCH_TYPE, query, what) as response:
                if response.status_code == 204:  # no match
                    return []
                try:
                    body = b"".join(self._iter_body(response, MAX_PAGE_BYTES, what))
                except UnusableInstance:
                    actual = f"more than {MAX_PAGE_BYTES >> 20} MiB; pass a smaller --page-size"
                    raise self._fail(what, actual) from None
            try:
                content = json.loads(body)
            except (ValueError, RecursionError):
                raise self._fail(what, "a body that is not JSON", transient=True) from None
            if not (isinstance(content, list) and all(isinstance(item, dict) for item in content)):
                raise self._fail(what, "JSON of another shape. Is this the root of a DICOMweb service?")
            return content

        return self._retries.call(self.url, request)

    def retrieve(self, address: InstanceAddress, target: Path, *, max_bytes: int, what: str) -> int:
        """Retrieve an instance into the file `target` and return its size; the file appears when it is complete.

        Raises UnusableInstance if the server does not have it or it is too large; HttpFailure.
        """
        path = f"/studies/{address.study}/series/{address.series}/instances/{address.instance}"
        body, partial = target.with_name(target.name + ".body.partial"), target.with_name(target.name + ".partial")

        def request() -> int:
            with self._open(path, _RETRIEVE_TYPE, (), what) as response, body.open("wb") as file:
                for chunk in self._iter_body(response, max_bytes + _MULTIPART_OVERHEAD, what):
                    file.write(chunk)
                content_type = response.headers.get("content-type", "")
            return self._unwrap(body, content_type, partial, what)

        try:
            size = self._retries.call(self.url, request)
            partial.replace(target)
        finally:
            body.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
        return size

    def _unwrap(self, body: Path, content_type: str, target: Path, what: str) -> int:
        """Write the one part of a multipart body into `target`; a body of the plain type is taken as it is."""
        header = Message()
        header["content-type"] = content_type
        kind, boundary = header.get_content_type(), header.get_param("boundary")
        if kind == "application/dicom":
            body.replace(target)
            return target.stat().st_size
        if kind != "multipart/related" or not isinstance(boundary, str) or not body.stat().st_size:
            raise self._fail(what, f"a reply of type {kind or 'unknown'} without an instance")
        with body.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            delimiter = b"--" + boundary.encode()
            opening = view.find(delimiter)
            start = view.find(b"\r\n\r\n", opening) + 4
            end = view.find(b"\r\n" + delimiter, start)
            if opening < 0 or start < 4 or end < 0:
                raise self._fail(what, "a reply that was cut off", transient=True)
            closing = end + 2 + len(delimiter)
            if view[closing : closing + 2] != b"--":
                raise self._fail(what, "a reply with several instances")
            with target.open("wb") as part:
                _copy_range(view, start, end, part)
        return end - start

    @contextmanager
    def _open(self, path: str, accept: str, query: Sequence[tuple[str, str]], what: str) -> Iterator[httpx.Response]:
        """Send a GET and give its successful response, whose body is unread. Raises HttpFailure."""
        timeout_s = self._access.timeout_s
        address = f"{self.url}{path}{'?' * bool(query)}{urlencode(query, safe=_UNQUOTED, quote_via=quote)}"
        try:
            with self._http.stream("GET", address, headers={"Accept": accept}) as response:
                if response.status_code not in (200, 204, 206):
                    raise self._build_status_error(what, response, searches=accept == _SEARCH_TYPE)
                yield response
        except httpx.TimeoutException as error:
            unconnected = isinstance(error, httpx.ConnectTimeout)
            raise self._fail(
                what, f"nothing within {timeout_s:.3g} s", transient=True, away=unconnected, timed_out=True
            ) from None
        except httpx.HTTPError as error:
            passes = not (is_unknown_host(error) or is_wrong_certificate(error))
            cut = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
            reason = "a certificate that is not trusted (see --ca-file)" if is_wrong_certificate(error) else "no reply"
            raise self._fail(
                what, f"{reason}: {type(error).__name__}", transient=passes, away=cut and passes, fatal=not passes
            ) from None

    def _iter_body(self, response: httpx.Response, max_bytes: int, what: str) -> Iterator[bytes]:
        """Yield the body in pieces; raises UnusableInstance above `max_bytes`, HttpFailure if it comes too slowly."""
        started, size = time.monotonic(), 0
        for chunk in response.iter_bytes():
            size += len(chunk)
            if size > max_bytes:
                raise UnusableInstance(f"expected at most {max_bytes >> 20} MiB, got more. Export a smaller image")
            if time.monotonic() - started > self._access.timeout_s + size / _SLOWEST_BYTES_S:
                raise self._fail(what, f"{size} bytes in {self._access.timeout_s:.3g} s", transient=True)
            yield chunk

    def _build_status_error(self, what: str, response: httpx.Response, *, searches: bool) -> Exception:
        """The error of a status; the body is not quoted, because it may contain identifiers."""
        status = response.status_code
        if status in (404, 410) and not searches:
            return UnusableInstance(f"the server lists it, but does not have it (HTTP {status})")
        remedy = ""
        if status == 401:
            sent = "the credentials sent were not accepted" if self._access.auth_header else "credentials are needed"
            remedy = f": {sent} (see --token-env and --basic-env)"
        elif status == 403:
            remedy = ": these credentials may not read this"
        elif 300 <= status < 400:
            remedy = ": the service has another address; name that one, since redirects are not followed"
        elif status in (404, 405):
            remedy = ": this is not the root of a DICOMweb service, such as https://pacs.example/dicom-web"
        elif status in (406, 415):
            remedy = ": the server cannot send this type"
        wait = response.headers.get("retry-after") if status in (429, 503) else None
        away = status in (429, 502, 503)
        return self._fail(
            what,
            f"HTTP {status}{remedy}",
            status=status,
            away=away,
            transient=status == 408 or (is_passing_status(status) and status != 501),
            fatal=status in (401, 403) or 300 <= status < 400,
            retry_after_s=parse_retry_after(wait) if wait else None,
        )

    def _fail(self, what: str, actual: str, **facts: Any) -> HttpFailure:
        return HttpFailure(f"{self.url}: {what}: got {actual}", summary=actual, **facts)


def read_uid(item: SearchItem, tag: str, url: str) -> str:
    """The UID in a search result. Raises HttpFailure if there is none, since it becomes part of paths."""
    uid = read_value(item, tag)
    if not is_uid(uid):
        raise HttpFailure(f"{url}: expected a UID as attribute {tag} of every search result, got another value")
    return uid


def read_value(item: SearchItem, tag: str) -> str:
    """The first value of an attribute as text; "" if there is none."""
    values = (item.get(tag) or {}).get("Value") or [""]
    return str(values[0]).strip()


def is_uid(text: str) -> bool:
    """Whether a text is a UID: digits and dots, 64 characters at most [DICOM PS3.5 9.1]."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def _build_tls_context(ca_file: Path | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(f"--ca-file {ca_file}: expected certificates in PEM format ({error})") from None


@contextmanager
def _silence_http_log() -> Iterator[None]:
    """Keep addresses, which contain identifiers, out of the logs of the HTTP client."""
    loggers = [logging.getLogger(name) for name in ("httpx", "httpcore.http11", "httpcore.connection")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was


def _copy_range(view: mmap.mmap, start: int, end: int, target: IO[bytes]) -> None:
    for at in range(start, end, 1 << 20):
        target.write(view[at : min(end, at + (1 << 20))])
