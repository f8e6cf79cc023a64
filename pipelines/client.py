"""A connection to Kubeflow Pipelines: where it is, who we are, and errors that say which of the two is wrong."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import kfp
import urllib3
from kfp_server_api import ApiException

from clincot.errors import InvalidInput, UserError

POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # as Kubeflow's documentation projects it
REQUEST_S = 30.0
_MAX_SHOWN_CHARS = 300


class PipelinesFailed(UserError, RuntimeError):
    """Kubeflow Pipelines refused, or could not be reached; says which, and what would mend it."""


@dataclass(frozen=True)
class Connection:
    """A client, and the names that a line of rounds has there."""

    client: kfp.Client
    endpoint: str
    ui: str
    namespace: str  # of a multi-user installation; "" for others
    pipeline: str
    experiment: str

    def ensure_experiment(self) -> str:
        """Of the experiment, which is made where it is not there."""
        with kfp_errors(self.endpoint):
            made = self.client.create_experiment(self.experiment, namespace=self.namespace or None)
            found: str = made.experiment_id
            return found


def connect_pipelines(
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
    """Connect, after one question that tells a wrong address from a wrong token. Raises BadInput, PipelinesFailed.

    profile: the namespace where the installation is a multi-user one and `namespace` is not given.
    """
    endpoint = (endpoint or os.environ.get("KFP_ENDPOINT", "")).rstrip("/")
    if not endpoint:
        raise InvalidInput(
            "where is Kubeflow Pipelines? name it with --endpoint or KFP_ENDPOINT (https://host/pipeline)"
        )
    if not endpoint.startswith(("http://", "https://")):
        raise InvalidInput(f"the endpoint must start with http:// or https://, got {endpoint!r}")
    token, origin = _read_token(token_file)
    multi_user = _probe_endpoint(endpoint, token, origin, ca_cert)
    namespace = namespace or (profile if multi_user else "")
    if multi_user and not namespace:
        raise InvalidInput(f"{endpoint} is a multi-user installation: name the profile's namespace with --namespace")
    with kfp_errors(endpoint), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # kfp asks for the namespace by itself where it is left out, five times
        client = kfp.Client(
            host=endpoint,
            existing_token=token or None,
            ssl_ca_cert=str(ca_cert) if ca_cert else None,
            namespace=namespace or " ",
            ui_host=ui or endpoint,
        )
    client._context_setting["namespace"] = namespace
    return Connection(client, endpoint, (ui or endpoint).rstrip("/"), namespace, pipeline, experiment)


@contextlib.contextmanager
def kfp_errors(endpoint: str) -> Iterator[None]:
    """What the client raises, in a sentence; what it prints, to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ApiException as error:
        raise PipelinesFailed(_describe_refusal(endpoint, error.status, str(error.body or error.reason))) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise PipelinesFailed(f"{endpoint}: no answer from Kubeflow Pipelines: {type(error).__name__}") from None


def _read_token(token_file: Path | None) -> tuple[str, str]:
    """The bearer token, and where it is from; ("", "") without one."""
    if token_file is None and os.environ.get("KFP_TOKEN"):
        return os.environ["KFP_TOKEN"].strip(), "KFP_TOKEN"
    named = token_file or (Path(os.environ["KFP_TOKEN_FILE"]) if os.environ.get("KFP_TOKEN_FILE") else None)
    if named is None and POD_TOKEN.is_file():
        named = POD_TOKEN
    if named is None:
        return "", ""
    try:
        token = named.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidInput(f"{named}: the token cannot be read: {error.strerror}") from None
    if not token:
        raise InvalidInput(f"{named}: is empty, expected a bearer token")
    return token, str(named)


def _probe_endpoint(endpoint: str, token: str, origin: str, ca_cert: Path | None) -> bool:
    """Is it Kubeflow Pipelines, and does it let us in? Returns whether it is a multi-user installation."""
    url = f"{endpoint}/apis/v2beta1/healthz"
    try:
        reply = httpx.get(
            url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=REQUEST_S,
            verify=str(ca_cert) if ca_cert else True,
        )
    except (httpx.HTTPError, OSError) as error:
        raise PipelinesFailed(
            f"{url}: no answer ({type(error).__name__}: {error}); is --endpoint (KFP_ENDPOINT) right?"
        ) from None
    if reply.status_code in (301, 302, 303, 307, 401, 403):  # a login page is a no as well
        raise PipelinesFailed(
            _describe_refusal(endpoint, 401 if reply.is_redirect else reply.status_code, reply.text, origin)
        )
    try:
        multi_user = reply.json().get("multi_user", False) if reply.status_code == 200 else None
    except (ValueError, AttributeError):
        multi_user = None
    if multi_user is None:
        raise PipelinesFailed(
            f"{url}: HTTP {reply.status_code}, not what Kubeflow Pipelines answers; is --endpoint (KFP_ENDPOINT) right?"
            " Behind Kubeflow's gateway it ends in /pipeline"
        )
    return bool(multi_user)


def _describe_refusal(endpoint: str, status: int, body: str, origin: str = "") -> str:
    said = " ".join(body.split())[:_MAX_SHOWN_CHARS]
    if status in (401, 403):
        token = f"the token of {origin}" if origin else "the token, if there is one,"
        return (
            f"{endpoint}: HTTP {status}, not let in: {token} has expired or is not allowed to; get a new one and set "
            f"KFP_TOKEN, KFP_TOKEN_FILE or --token-file ({said})"
        )
    return f"{endpoint}: HTTP {status}: {said}"
