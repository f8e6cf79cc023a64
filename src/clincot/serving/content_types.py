"""Media types of requests: every spelling of JSON, and the binary tensors of the V2 protocol.

Clients write JSON's type with parameters (Spring, axios, .NET), in other case, or as application/…+json. KServe's
DataPlane.decode (kserve 0.21.0, protocol/dataplane.py) compares the header with JSON_HEADERS letter by letter, so the
application behind always sees one of two types. RFC 8259 section 11 defines no parameters for JSON, which is UTF-8, and
RFC 9110 section 8.3.1 ignores case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from clincot.serving.api_errors import ApiError

_JSON, _BINARY = "application/json", "application/octet-stream"
_JSON_TYPE = re.compile(r"(application|text)/json|application/(?!cloudevents)[a-z0-9.!#$&^_-]+\+json")
_CHARSET = re.compile(r';\s*charset\s*=\s*"?([^";\s]+)', re.IGNORECASE)
V2_INFER_PATH = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/infer")
BINARY_LENGTH_HEADER = "inference-header-content-length"  # of requests with binary tensors: the bytes of their JSON


def choose_content_type(path: str, headers: Mapping[str, str]) -> str:
    """The media type under which the application reads a request.

    headers: with names in lower case. tritonclient 2.73 sends no Content-Type, neither with JSON nor with binary
    tensors (http/_client.py). Raises ApiError (415) for other types.
    """
    given, infers = headers.get("content-type", ""), bool(V2_INFER_PATH.fullmatch(path))
    media_type = given.partition(";")[0].strip().lower()
    charset = _CHARSET.search(given)
    if infers and BINARY_LENGTH_HEADER in headers:
        return _BINARY
    if not (_JSON_TYPE.fullmatch(media_type) or (infers and not media_type)):
        expected = "expected a request with Content-Type: application/json"
        if infers:
            expected += ", or binary tensors with Inference-Header-Content-Length"
        raise ApiError(415, "unsupported_media_type", expected)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, "unsupported_media_type", "expected JSON in UTF-8")
    return _JSON
