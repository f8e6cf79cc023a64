"""Which errors of botocore pass: those of a store that is away, restarts or asks for fewer requests."""

from __future__ import annotations

from botocore.exceptions import (
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
)

from clincot.waiting import (
    Outage,
    is_passing_status,
    is_unknown_host,
    is_wrong_certificate,
    iter_causes,
    parse_retry_after,
)

# Refusals that ask for another attempt with a status of 4xx (botocore 1.43, data/_retry.json, and S3's error codes).
_PASSING_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequestsException"}


def find_store_outage(error: BaseException) -> Outage | None:
    """Return why a request failed, if the same request may succeed later: no reply, 5xx, 429 or throttling.

    Looks through the errors that others, such as s3fs, raise from one of botocore's.
    """
    if is_unknown_host(error) or is_wrong_certificate(error):
        return None
    for one in iter_causes(error):
        if isinstance(one, ClientError):
            return _find_refusal(one)
        if isinstance(one, ConnectionError | HTTPClientError | IncompleteReadError | ResponseStreamingError):
            return Outage(type(one).__name__)
    return None


def _find_refusal(error: ClientError) -> Outage | None:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if not (is_passing_status(status) or code in _PASSING_CODES):
        return None
    asked = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    return Outage(f"HTTP {status} {code}", parse_retry_after(asked))
