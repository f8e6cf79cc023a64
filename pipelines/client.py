"""Connection to Kubeflow Pipelines, with errors that tell a wrong address from a wrong token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import kfp
import urllib3
from kfp_server_api import ApiException

from clincot.clients.http import parse_retry_after
from clincot.errors import InvalidInput, UserError
from clincot.waiting import (
    Outage,
    get_waiting,
    is_passing_status,
    is_unknown_host,
    is_wrong_certificate,
    iter_causes,
)

POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # where Kubeflow's documentation mounts it
REQUEST_S = 30.0
_MAX_SHOWN_CHARS = 300
# The cause follows such a name: "Failed to get a run: Failed to fetch run r: ResourceNotFoundError: Run r not found"
# (kubeflow/pipelines 2.17.0, backend/src/common/util/error.go).
_ERROR_NAME = re.compile(r"\b(?:\w+Error|PermissionDenied|Unauthenticated): ")


class ServerInfo(NamedTuple):
    """What the health check of the API server reports."""

    multi_user: bool
    version: str  # the release, for example 2.17.0; "unknown" if the image was built without a tag


class PipelinesFailed(UserError, RuntimeError):
    """Kubeflow Pipelines refused a request or did not answer; the message says which, and what to do."""


@dataclass(frozen=True)
class Connection:
    """A client, and the names of our pipeline and experiment on the server."""

    client: kfp.Client
    endpoint: str
    ui: str
    namespace: str  # the profile's on a multi-user installation, otherwise ""
    pipeline: str
    experiment: str
    server_version: str = "unknown"

    def ensure_experiment(self) -> str:
        """Return the id of the experiment; create the experiment if it does not exist."""
        with kfp_errors(self.endpoint):
            experiment = self.client.create_experiment(self.experiment, namespace=self.namespace or None)
            experiment_id: str = experiment.experiment_id
            return experiment_id


def connect_pipelines(  # noqa: PLR0913 (one keyword per command-line option)
    endpoint: str = "",
    *,
    token_file: Path | None = None,
    ca_cert: Path | None = None,
    ui: str = "",
    namespace: str = "",
    profile: str = "",
    pipeline: str = "clincot-round",
    experiment: str = "clincot",
) -> Connection:
    """Connect to Kubeflow Pipelines after a health check. Raises InvalidInput and PipelinesFailed.

    profile: the namespace to use if the installation is a multi-user one and `namespace` is empty.
    """
    endpoint = (endpoint or os.environ.get("KFP_ENDPOINT", "")).rstrip("/")
    if not endpoint:
        raise InvalidInput("no endpoint of Kubeflow Pipelines: set --endpoint or KFP_ENDPOINT (https://host/pipeline)")
    if not endpoint.startswith(("http://", "https://")):
        raise InvalidInput(f"the endpoint must start with http:// or https://, got {endpoint!r}")
    token, origin = _read_token(token_file)
    server = _probe_endpoint(endpoint, token, origin, ca_cert)
    namespace = namespace or (profile if server.multi_user else "")
    if server.multi_user and not namespace:
        raise InvalidInput(
            f"{endpoint} is a multi-user installation: set the namespace of your profile with --namespace"
        )
    with kfp_errors(endpoint), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # without a namespace, kfp asks the server for one, with five attempts; a space prevents that
        client = kfp.Client(
            host=endpoint,
            existing_token=token or None,
            ssl_ca_cert=str(ca_cert) if ca_cert else None,
            namespace=namespace or " ",
            ui_host=ui or endpoint,
        )
    client._context_setting["namespace"] = namespace
    _wait_for_server(client, endpoint)
    return Connection(client, endpoint, (ui or endpoint).rstrip("/"), namespace, pipeline, experiment, server.version)


def _wait_for_server(client: kfp.Client, endpoint: str) -> None:
    """Make the client wait for a server that is away (clincot/waiting.py), below all of its methods.

    A request that changes something is repeated only if the server refused it as a whole or was not reached.
    """
    rest = client._run_api.api_client.rest_client
    send_once = rest.request

    def send(method: str, *args: Any, **kwargs: Any) -> Any:
        return get_waiting().call(
            _name_service(endpoint),
            lambda: send_once(method, *args, **kwargs),
            lambda error: _find_outage(error, repeatable=method in ("GET", "HEAD", "DELETE")),
        )

    rest.request = send


def _name_service(endpoint: str) -> str:
    return f"Kubeflow Pipelines at {endpoint}"


def _find_outage(error: BaseException, *, repeatable: bool = True) -> Outage | None:
    """Return why a request failed, if the server is away."""
    if isinstance(error, ApiException):
        asked = str((error.headers or {}).get("Retry-After", ""))
        passes = is_passing_status(error.status) if repeatable else error.status in (429, 502, 503)
        return Outage(f"HTTP {error.status}", float(asked) if asked.isdigit() else None) if passes else None
    if isinstance(error, _ServerError):
        return Outage(str(error), parse_retry_after(error.reply.headers.get("Retry-After", "")))
    if not isinstance(error, (urllib3.exceptions.HTTPError, httpx.HTTPError, ConnectionError)):
        return None
    if is_unknown_host(error) or is_wrong_certificate(error):
        return None
    unreached = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
    if not repeatable and not any(isinstance(one, unreached) for one in iter_causes(error)):
        return None
    return Outage(type(error).__name__)


@contextlib.contextmanager
def kfp_errors(endpoint: str) -> Iterator[None]:
    """Turn errors of the client into PipelinesFailed, and send to stderr what the client prints."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ApiException as error:
        raise PipelinesFailed(_describe_refusal(endpoint, error.status, str(error.body or error.reason))) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise PipelinesFailed(f"{endpoint}: no answer from Kubeflow Pipelines: {type(error).__name__}") from None


def _read_token(token_file: Path | None) -> tuple[str, str]:
    """Return the bearer token and its source, or ("", "") without a token."""
    if token_file is None and os.environ.get("KFP_TOKEN"):
        return os.environ["KFP_TOKEN"].strip(), "KFP_TOKEN"
    path = token_file or (Path(os.environ["KFP_TOKEN_FILE"]) if os.environ.get("KFP_TOKEN_FILE") else None)
    if path is None and POD_TOKEN.is_file():
        path = POD_TOKEN
    if path is None:
        return "", ""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot read the token: {error.strerror}") from None
    if not token:
        raise InvalidInput(f"{path}: is empty, expected a bearer token")
    return token, str(path)


def _probe_endpoint(endpoint: str, token: str, origin: str, ca_cert: Path | None) -> ServerInfo:
    """Check that the endpoint is Kubeflow Pipelines and accepts the token; return what it reports about itself."""
    url = f"{endpoint}/apis/v2beta1/healthz"
    try:
        reply = _get_health(endpoint, url, token, ca_cert)
    except (httpx.HTTPError, OSError) as error:
        raise PipelinesFailed(
            f"{url}: no answer ({type(error).__name__}: {error}); is --endpoint (KFP_ENDPOINT) right?"
        ) from None
    status = 401 if reply.is_redirect else reply.status_code  # a redirect to a login page is a refusal, too
    if status in (401, 403) or status >= 500:
        raise PipelinesFailed(_describe_refusal(endpoint, status, reply.text, origin))
    health = _parse_json_object(reply.text) if status == 200 else None
    if health is None:
        raise PipelinesFailed(
            f"{url}: HTTP {status}, not an answer of Kubeflow Pipelines; is --endpoint (KFP_ENDPOINT) right?"
            " Behind Kubeflow's gateway it ends in /pipeline"
        )
    return ServerInfo(bool(health.get("multi_user", False)), str(health.get("tag_name") or "unknown"))


def _get_health(endpoint: str, url: str, token: str, ca_cert: Path | None) -> httpx.Response:
    """Return the reply of the health check; while the server is away, wait."""

    def get_once() -> httpx.Response:
        reply = httpx.get(
            url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=REQUEST_S,
            verify=str(ca_cert) if ca_cert else True,
        )
        if is_passing_status(reply.status_code):
            raise _ServerError(reply)
        return reply

    try:
        return get_waiting().call(_name_service(endpoint), get_once, _find_outage)
    except _ServerError as error:
        return error.reply


class _ServerError(Exception):
    """A reply with a status that passes."""

    def __init__(self, reply: httpx.Response) -> None:
        super().__init__(f"HTTP {reply.status_code}")
        self.reply = reply


def _describe_refusal(endpoint: str, status: int, body: str, origin: str = "") -> str:
    """Return one sentence: what the status means, the server's own reason, and what to do."""
    reason = _extract_reason(body)
    shown = f" ({reason})" if reason else ""
    token = f"the token of {origin}" if origin else "the token, if there is one,"
    if status == 401:
        meaning = (
            f"access denied: {token} has expired or is not accepted; get a new one and set KFP_TOKEN, KFP_TOKEN_FILE "
            f"or --token-file{shown}"
        )
    elif status == 403:
        meaning = (
            f"access denied: {token} has expired or lacks permission{shown}; check --namespace and the roles of the "
            "account, or get a new token"
        )
    elif status == 404:
        meaning = f"not found{shown}"
    elif status == 409:
        meaning = f"something of this name exists already{shown}"
    elif status >= 500:
        meaning = f"Kubeflow Pipelines has failed or is not ready{shown}; try again, or read the log of ml-pipeline"
    else:
        meaning = f"the request was refused{shown}"
    return f"{endpoint}: HTTP {status}, {meaning}"


def _extract_reason(body: str) -> str:
    """Return the innermost message of an error body on one line, without the Go stack; "" if it has none.

    The gRPC gateway answers {"code", "message", "details": [{"message"}]}, the upload server {"error_message",
    "error_details"}, of which the latter is a stack (kubeflow/pipelines 2.17.0,
    backend/src/apiserver/server/pipeline_upload_server.go: writeErrorToResponse). A proxy in front of them may answer
    with text or HTML.
    """
    answer = _parse_json_object(body)
    if answer is None:
        message = "" if body.lstrip().startswith("<") else body
    else:
        details = answer.get("details")
        nested = [detail.get("message") for detail in details if isinstance(detail, dict)] if details else []
        candidates = [*nested, answer.get("message"), answer.get("error_message"), answer.get("error")]
        message = next((text for text in candidates if isinstance(text, str) and text), "")
    first_line = message.strip().partition("\n")[0]
    named = _ERROR_NAME.search(first_line)
    reason = first_line[named.end() :] if named else first_line
    return " ".join(reason.split())[:_MAX_SHOWN_CHARS].rstrip(" .")


def _parse_json_object(text: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(text)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
