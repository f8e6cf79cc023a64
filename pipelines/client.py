"""Connection to Kubeflow Pipelines, with errors that tell a wrong address from a wrong token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import kfp
import urllib3
from kfp_server_api import ApiException
from kfp_server_api.rest import RESTClientObject

from clincot.errors import InvalidInput, UserError
from clincot.pipelines.ownership import Owner
from clincot.waiting import (
    Outage,
    get_waiting,
    is_passing_status,
    is_unknown_host,
    is_wrong_certificate,
    iter_causes,
    parse_retry_after,
)

POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # where Kubeflow's documentation mounts it
REQUEST_S = 30.0
_MAX_SHOWN_CHARS = 300
_REDIRECTS = (301, 302, 303, 307, 308)
# The cause follows such a name: "Failed to get a run: Failed to fetch run r: ResourceNotFoundError: Run r not found"
# (kubeflow/pipelines 2.17.0, backend/src/common/util/error.go).
_ERROR_NAME = re.compile(r"\b(?:\w+Error|PermissionDenied|Unauthenticated): ")


class ServerInfo(NamedTuple):
    """What the health check of the API server reports."""

    multi_user: bool
    version: str  # the release, for example 2.17.0; "unknown" if the image was built without a tag


class PipelinesFailed(UserError, RuntimeError):
    """Kubeflow Pipelines refused a request or did not answer; the message says which, and what to do."""


class PipelinesUnavailable(PipelinesFailed):
    """Kubeflow Pipelines did not answer or reported an error of its own; the same request may succeed later."""


class PipelinesAbsent(PipelinesFailed):
    """The host of the endpoint does not exist."""


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
    owner: Owner = field(default_factory=Owner)

    def find_experiment(self) -> str | None:
        """Return the id of the experiment; None if it does not exist."""
        by_name = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": self.experiment}]}
        with kfp_errors(self.endpoint):
            page = self.client.list_experiments(filter=json.dumps(by_name), namespace=self.namespace or None)
        return str(page.experiments[0].experiment_id) if page.experiments else None

    def ensure_experiment(self) -> str:
        """Return the id of the experiment; create the experiment if it does not exist."""
        found = self.find_experiment()
        if found is not None:
            return found
        with kfp_errors(self.endpoint):
            try:
                created = self.client.create_experiment(
                    self.experiment,
                    description=f"Rounds of the model line {self.owner.line}.",
                    namespace=self.namespace or None,
                )
            except ApiException as error:
                if error.status != 409:
                    raise
                found = self.find_experiment()  # another caller created it after the look-up
                if found is None:
                    raise
                return found
        return str(created.experiment_id)

    def find_version(self, source: Any) -> Any | None:
        """Return the version of a pipeline that a run or recurring run refers to; None if it has been deleted."""
        with kfp_errors(self.endpoint):
            try:
                return self.client.get_pipeline_version(source.pipeline_id, source.pipeline_version_id)
            except ApiException as error:
                if error.status == 404:
                    return None
                raise

    def link_run(self, run_id: str) -> str:
        """Return the address of a run in the UI."""
        return f"{self.ui}/#/runs/details/{run_id}"


class TokenSource(NamedTuple):
    """Where the bearer token comes from. A file is read again before every request, because Kubernetes rotates it."""

    path: Path | None = None
    value: str = ""
    name: str = ""  # the variable or option that holds the value

    def read(self) -> str:
        """Return the token, or "" without one. Raises InvalidInput if the file is missing or empty."""
        if self.path is None:
            return self.value
        try:
            token = self.path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise InvalidInput(f"{self.path}: cannot read the token: {error.strerror}") from None
        if not token:
            raise InvalidInput(f"{self.path}: is empty, expected a bearer token")
        return token

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else self.name


def connect_pipelines(  # noqa: PLR0913 (one keyword per command-line option)
    endpoint: str = "",
    *,
    token_file: Path | None = None,
    token: str = "",
    ca_cert: Path | None = None,
    ui: str = "",
    namespace: str = "",
    profile: str = "",
    pipeline: str = "",
    experiment: str = "",
    owner: Owner | None = None,
) -> Connection:
    """Connect to Kubeflow Pipelines after a health check. Raises InvalidInput and PipelinesFailed.

    token: a bearer token, which has precedence over files and variables.
    profile: the namespace to use if the installation is a multi-user one and `namespace` is empty.
    pipeline, experiment: their names; if empty, they are derived from the owner's model line.
    """
    endpoint = (endpoint or os.environ.get("KFP_ENDPOINT", "")).rstrip("/")
    owner = owner or Owner()
    if not endpoint:
        raise InvalidInput("no endpoint of Kubeflow Pipelines: set --endpoint or KFP_ENDPOINT (https://host/pipeline)")
    if not endpoint.startswith(("http://", "https://")):
        raise InvalidInput(f"the endpoint must start with http:// or https://, got {endpoint!r}")
    source = TokenSource(value=token, name="--existing-token") if token else _find_token(token_file)
    if ca_cert is None and (bundle := os.environ.get("SSL_CERT_FILE")):
        ca_cert = Path(bundle)  # httpx reads the variable itself; kfp's client does not
    server = _probe_endpoint(endpoint, source, ca_cert)
    namespace = namespace or (profile if server.multi_user else "")
    if server.multi_user and not namespace:
        raise InvalidInput(
            f"{endpoint} is a multi-user installation: set the namespace of your profile with --namespace"
        )
    return Connection(
        client=_build_client(endpoint, source, ca_cert, namespace, ui or endpoint),
        endpoint=endpoint,
        ui=(ui or endpoint).rstrip("/"),
        namespace=namespace if server.multi_user else "",
        pipeline=pipeline or owner.pipeline_name,
        experiment=experiment or owner.experiment_name,
        server_version=server.version,
        owner=owner,
    )


def _find_proxy(endpoint: str) -> str | None:
    """Return the proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY name for the endpoint; kfp's client reads none."""
    url = httpx.URL(endpoint)
    if urllib.request.proxy_bypass(url.netloc.decode("ascii")):
        return None
    return urllib.request.getproxies_environment().get(url.scheme)


def _build_client(endpoint: str, source: TokenSource, ca_cert: Path | None, namespace: str, ui: str) -> kfp.Client:
    """Build a client whose requests have a time limit, follow no redirects and read the token again."""
    with kfp_errors(endpoint), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # without a namespace, kfp asks the server for one, with five attempts; a space prevents that
        client = kfp.Client(
            host=endpoint,
            existing_token=source.read() or None,
            ssl_ca_cert=str(ca_cert) if ca_cert else None,
            proxy=_find_proxy(endpoint),
            namespace=namespace or " ",
            ui_host=ui,
        )
    client._context_setting["namespace"] = namespace
    api = client._run_api.api_client  # all services share it
    if source.path is not None:
        api.configuration.refresh_api_key_hook = lambda configuration: configuration.api_key.update(
            authorization=source.read()
        )
    api.configuration.retries = urllib3.Retry(
        total=None, connect=0, read=0, redirect=0, status=0, other=0, raise_on_redirect=False
    )
    api.rest_client = _RestClient(api.configuration)
    return client


class _RestClient(RESTClientObject):  # type: ignore[misc]  # kfp_server_api has no types
    """The HTTP client of kfp with a time limit, and an error for a web page, which kfp reads as an empty object.

    It waits for a server that is away (clincot/waiting.py). A request that changes something is repeated only if the
    server refused it as a whole or was not reached.
    """

    def __init__(self, configuration: Any) -> None:
        super().__init__(configuration)
        self._host = configuration.host

    def request(self, method: str, url: str, *args: Any, **options: Any) -> Any:
        options["_request_timeout"] = options.get("_request_timeout") or int(REQUEST_S)
        response = get_waiting().call(
            _name_service(self._host),
            partial(super().request, method, url, *args, **options),
            partial(_find_outage, repeatable=method in ("GET", "HEAD", "DELETE")),
        )
        if response.data.lstrip()[:1] == b"<":
            raise PipelinesFailed(
                f"{self._host}: HTTP {response.status}, a web page instead of an answer, such as that of a login; get "
                "a new token and set KFP_TOKEN, KFP_TOKEN_FILE or --token-file"
            )
        return response


def _name_service(endpoint: str) -> str:
    return f"Kubeflow Pipelines at {endpoint}"


def _find_outage(error: BaseException, *, repeatable: bool = True) -> Outage | None:
    """Return why a request failed, if the server is away."""
    if isinstance(error, ApiException):
        asked_s = parse_retry_after((error.headers or {}).get("Retry-After", ""))
        passes = is_passing_status(error.status) if repeatable else error.status in (429, 502, 503)
        return Outage(f"HTTP {error.status}", asked_s) if passes else None
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


def iter_pages(list_page: Callable[..., Any], items: str) -> Iterator[Any]:
    """Yield the entries of all pages. list_page: takes page_token and page_size. items: name of a page's entries."""
    token = ""
    while True:
        page = list_page(page_token=token, page_size=100)
        yield from getattr(page, items) or []
        token = page.next_page_token
        if not token:
            return


@contextlib.contextmanager
def kfp_errors(endpoint: str) -> Iterator[None]:
    """Turn errors of the client into PipelinesFailed, and send to stderr what the client prints."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ApiException as error:
        body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
        kind = PipelinesUnavailable if error.status >= 500 else PipelinesFailed
        raise kind(_describe_refusal(endpoint, error.status, str(body or error.reason))) from None
    except urllib3.exceptions.MaxRetryError as error:
        raise PipelinesUnavailable(_describe_silence(endpoint, error.reason or error)) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise PipelinesUnavailable(_describe_silence(endpoint, error)) from None


def _describe_silence(endpoint: str, error: Exception) -> str:
    """Return one sentence: why no answer came, and what to do."""
    refused = isinstance(error, urllib3.exceptions.NewConnectionError)  # which counts as a timeout in urllib3
    if isinstance(error, urllib3.exceptions.TimeoutError) and not refused:
        return (
            f"{endpoint}: no answer from Kubeflow Pipelines within {REQUEST_S:g} s; try again, or look whether the pod "
            "ml-pipeline is ready"
        )
    return (
        f"{endpoint}: no answer from Kubeflow Pipelines ({type(error).__name__}); try again, or look whether the "
        "address can be reached from here and the pod ml-pipeline is ready"
    )


def _find_token(token_file: Path | None) -> TokenSource:
    """Return the source of the bearer token: option, KFP_TOKEN, KFP_TOKEN_FILE, or what is projected into a pod."""
    if token_file is None and os.environ.get("KFP_TOKEN"):
        return TokenSource(value=os.environ["KFP_TOKEN"].strip(), name="KFP_TOKEN")
    path = token_file or (Path(os.environ["KFP_TOKEN_FILE"]) if os.environ.get("KFP_TOKEN_FILE") else None)
    if path is None and POD_TOKEN.is_file():
        path = POD_TOKEN
    return TokenSource(path=path)


def _probe_endpoint(endpoint: str, source: TokenSource, ca_cert: Path | None) -> ServerInfo:
    """Check that the endpoint is Kubeflow Pipelines and accepts the token; return what it reports about itself."""
    url, token = f"{endpoint}/apis/v2beta1/healthz", source.read()
    try:
        reply = _get_health(endpoint, url, token, ca_cert)
    except (httpx.HTTPError, OSError) as error:
        kind = PipelinesAbsent if is_unknown_host(error) else PipelinesFailed
        raise kind(f"{url}: no answer ({type(error).__name__}: {error}); is --endpoint (KFP_ENDPOINT) right?") from None
    status = reply.status_code
    if status in (401, 403, *_REDIRECTS) or status >= 500:
        raise PipelinesFailed(_describe_refusal(endpoint, status, reply.text, str(source)))
    health = _parse_json_object(reply.text) if status == 200 else None
    if health is None:
        page = "a web page" if reply.text.lstrip().startswith("<") else "not an answer of Kubeflow Pipelines"
        raise PipelinesFailed(
            f"{url}: HTTP {status}, {page}; is --endpoint (KFP_ENDPOINT) right? Behind Kubeflow's gateway it ends in "
            "/pipeline, and a login page means that a token is missing (KFP_TOKEN, KFP_TOKEN_FILE or --token-file)"
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
    renew = "get a new one and set KFP_TOKEN, KFP_TOKEN_FILE or --token-file"
    if status in _REDIRECTS:
        meaning = f"the gateway redirects to a login: {token} has expired or is not accepted; {renew}"
    elif status == 401:
        meaning = f"access denied: {token} has expired or is not accepted; {renew}{shown}"
    elif status == 403:
        meaning = (
            f"access denied: {token} has expired or lacks permission{shown}; check --namespace and the roles of the "
            "account, or get a new token"
        )
    elif status == 404:
        meaning = f"not found{shown}; check the id or name and --namespace"
    elif status == 409:
        meaning = f"something of this name exists already{shown}; repeat the command, or choose another name"
    elif status >= 500:
        meaning = f"Kubeflow Pipelines has failed or is not ready{shown}; try again, or read the log of ml-pipeline"
    else:
        meaning = f"the request was refused{shown}; check the parameters and --namespace"
    return f"{endpoint}: HTTP {status}, {meaning}"


def read_reason(error: ApiException) -> str:
    """Return the server's own reason for a refusal, or HTTP's."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
    return _extract_reason(str(body or "")) or str(error.reason)


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
