"""Connection to Kubeflow Pipelines, with errors that tell a wrong address from a wrong token."""

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

POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # where Kubeflow's documentation mounts it
REQUEST_S = 30.0
_MAX_SHOWN_CHARS = 300


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
    multi_user = _probe_endpoint(endpoint, token, origin, ca_cert)
    namespace = namespace or (profile if multi_user else "")
    if multi_user and not namespace:
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
    return Connection(client, endpoint, (ui or endpoint).rstrip("/"), namespace, pipeline, experiment)


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


def _probe_endpoint(endpoint: str, token: str, origin: str, ca_cert: Path | None) -> bool:
    """Check that the endpoint is Kubeflow Pipelines and accepts the token; return whether it is multi-user."""
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
    if reply.status_code in (301, 302, 303, 307, 401, 403):  # a redirect to a login page is a refusal, too
        raise PipelinesFailed(
            _describe_refusal(endpoint, 401 if reply.is_redirect else reply.status_code, reply.text, origin)
        )
    try:
        multi_user = reply.json().get("multi_user", False) if reply.status_code == 200 else None
    except (ValueError, AttributeError):
        multi_user = None
    if multi_user is None:
        raise PipelinesFailed(
            f"{url}: HTTP {reply.status_code}, not an answer of Kubeflow Pipelines; is --endpoint (KFP_ENDPOINT) right?"
            " Behind Kubeflow's gateway it ends in /pipeline"
        )
    return bool(multi_user)


def _describe_refusal(endpoint: str, status: int, body: str, origin: str = "") -> str:
    shown = " ".join(body.split())[:_MAX_SHOWN_CHARS]
    if status in (401, 403):
        token = f"the token of {origin}" if origin else "the token, if there is one,"
        return (
            f"{endpoint}: HTTP {status}, access denied: {token} has expired or lacks permission; get a new one and set "
            f"KFP_TOKEN, KFP_TOKEN_FILE or --token-file ({shown})"
        )
    return f"{endpoint}: HTTP {status}: {shown}"
