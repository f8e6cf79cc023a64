"""A small Kubernetes client: JSON objects by their API path. The only module that imports `kubernetes`.

Every failure is a ClusterFailed whose message names the request and quotes the API server's reply.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

from clincot.errors import UserError
from clincot.processes import retry_call
from clincot.waiting import (
    Outage,
    get_waiting,
    is_passing_status,
    is_unknown_host,
    is_wrong_certificate,
    parse_retry_after,
)

Json = dict[str, Any]
T = TypeVar("T")
REQUEST_S = 30.0
UPDATE_ATTEMPTS = 5  # attempts of an update that meets write conflicts
_QUOTED_CHARS = 300  # characters of a reply that a message quotes


class ClusterFailed(UserError, RuntimeError):
    """The API server refused a request or could not be reached.

    status: HTTP's; 0 means that no reply came. outage: set if the same request may succeed later.
    """

    def __init__(self, message: str, status: int = 0, outage: Outage | None = None) -> None:
        super().__init__(message)
        self.status, self.outage = status, outage


class ObjectNotFound(ClusterFailed):
    """The object, or its kind, does not exist."""


class Conflict(ClusterFailed):
    """Another client changed or created the object since it was read."""


class Forbidden(ClusterFailed):
    """The account lacks a permission; the message names the verb that its Role needs."""


class AdmissionDenied(ClusterFailed):
    """An admission webhook refused the object; a permission would not change that."""


class Permission(NamedTuple):
    """A permission that an account may need.

    namespace: "" means the whole cluster. name: "" means any object of the resource.
    """

    verb: str
    group: str
    resource: str  # "services", or with a subresource "services/proxy"
    namespace: str
    name: str = ""

    def __str__(self) -> str:
        resource = f"{self.resource}.{self.group}" if self.group else self.resource
        name = f" {self.name}" if self.name else ""
        return f"{self.verb} {resource}{name} in {self.namespace or 'the cluster'}"


def connect_cluster(context: str = "") -> Cluster:
    """Connect to the cluster of this pod, or outside of one to the kubeconfig's context ("": the current one).

    Raises ClusterFailed if neither is configured.
    """
    configuration = client.Configuration()
    configuration.retries = False  # urllib3 would try each connection four times; Cluster waits itself
    try:
        if not context and os.environ.get("KUBERNETES_SERVICE_HOST") and "KUBECONFIG" not in os.environ:
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(
                config_file=os.environ.get("KUBECONFIG"),  # the library reads it only once, on import
                context=context or None,
                client_configuration=configuration,
            )
    except (ConfigException, OSError) as error:
        raise ClusterFailed(f"no cluster to connect to: {error}; set KUBECONFIG or run in a pod") from None
    return Cluster(client.ApiClient(configuration))


class Cluster:
    """A connection to an API server. Paths are those of the Kubernetes API; resource_path() builds them.

    Every method raises ClusterFailed, or one of its subclasses, if the request fails.
    """

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    def get(self, path: str) -> Json:
        """Return the object. Raises ObjectNotFound."""
        return self.request("GET", path)

    def has_api(self, group: str, version: str) -> bool:
        """Return whether the cluster serves this API group, that is, whether its operator is installed."""
        try:
            self.request("GET", f"/apis/{group}/{version}")
        except ObjectNotFound:
            return False
        return True

    def is_allowed(self, permission: Permission) -> bool:
        """Return whether this account has the permission.

        Uses SelfSubjectAccessReview, which every account may create for itself.
        """
        resource, _, subresource = permission.resource.partition("/")
        attributes = {
            "verb": permission.verb,
            "group": permission.group,
            "resource": resource,
            "subresource": subresource,
            "namespace": permission.namespace,
            "name": permission.name,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {key: value for key, value in attributes.items() if value}},
        }
        answer = self.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        return answer.get("status", {}).get("allowed") is True

    def get_user_name(self) -> str:
        """Return the name of this account as the API server knows it; "" if the server does not say.

        Uses SelfSubjectReview, which every account may create for itself (Kubernetes 1.28 or later).
        """
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        try:
            answer = self.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review)
        except ClusterFailed:
            return ""
        return str(answer.get("status", {}).get("userInfo", {}).get("username", ""))

    def create(self, path: str, manifest: Json) -> Json:
        """Create the object. Raises Conflict if it exists.

        If the reply was lost, the next attempt finds the object of the first one; that is no conflict.
        """
        attempts = itertools.count()

        def create_once() -> Json:
            repeated = next(attempts) > 0
            try:
                return self._request_once("POST", path.rpartition("/")[0], manifest)
            except Conflict:
                existing = self.get(path) if repeated else {}
                if not _contains(existing, manifest):
                    raise
                return existing

        return self._wait_for_server(create_once)

    def delete(self, path: str) -> None:
        """Delete the object. Does nothing if it does not exist."""
        try:
            self.request("DELETE", path)
        except ObjectNotFound:
            return

    def update_with_retry(self, path: str, update: Callable[[Json], Json]) -> Json:
        """Read the object, apply `update` and write it back; after a write conflict, start again from the read.

        `update` gets a copy of the current object, may change it in place, and returns the new one. It may raise if
        the object is in an unexpected state. Raises Conflict if every attempt meets one.
        """

        def update_once() -> Json:
            before = self.get(path)
            after = update(json.loads(json.dumps(before)))
            return before if after == before else self.request("PUT", path, after)

        return retry_call(update_once, is_transient=lambda error: isinstance(error, Conflict), attempts=UPDATE_ATTEMPTS)

    def request(self, method: str, path: str, body: Json | None = None, *, timeout_s: float = REQUEST_S) -> Json:
        """Send one request and return the JSON of its reply ({} for an empty one)."""
        content = self.request_text(method, path, body, timeout_s=timeout_s)
        try:
            decoded: Json = json.loads(content) if content else {}
        except ValueError:
            raise ClusterFailed(f"{method} {path}: the reply is not JSON: {content[:_QUOTED_CHARS]!r}") from None
        return decoded

    def request_text(self, method: str, path: str, body: Json | None = None, *, timeout_s: float = REQUEST_S) -> str:
        """Send a request until the server answers it, and return the text of its reply.

        A request whose reply was lost may have taken effect. Sending it again is harmless: a DELETE or POST is refused
        then (404, 409), and a PUT with an old resourceVersion, too.
        """
        return self._wait_for_server(lambda: self._send_once(method, path, body, timeout_s))

    def _request_once(self, method: str, path: str, body: Json) -> Json:
        content = self._send_once(method, path, body, REQUEST_S)
        decoded: Json = json.loads(content)
        return decoded

    def _wait_for_server(self, call: Callable[[], T]) -> T:
        return get_waiting().call(f"API server {self._api.configuration.host}", call, _get_outage)

    def _send_once(self, method: str, path: str, body: Json | None, timeout_s: float) -> str:
        headers = {"Accept": "application/json, */*", "Content-Type": "application/json"}
        try:
            reply = self._api.call_api(
                path,
                method,
                body=body,
                header_params=headers,
                auth_settings=["BearerToken"],
                _request_timeout=timeout_s,
                _preload_content=False,
                _return_http_data_only=True,
            )
            content: bytes = reply.data
        except ApiException as error:
            raise _parse_api_error(method, path, error) from None
        except HTTPError as error:
            reason = getattr(error, "reason", None) or error
            message = f"{method} {path}: no reply from the API server: {type(reason).__name__}"
            if is_unknown_host(error) or is_wrong_certificate(error):
                raise ClusterFailed(f"{message}: {reason}") from None
            raise ClusterFailed(message, outage=Outage(type(reason).__name__)) from None
        return content.decode("utf-8", errors="replace")

    def close(self) -> None:
        self._api.close()


def resource_path(group: str, version: str, namespace: str, plural: str, name: str = "") -> str:
    """Return the API path of a namespaced object, or of all of its kind (name ""). group "" is the core API."""
    root = f"/apis/{group}/{version}" if group else f"/api/{version}"
    return f"{root}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


def crd_path(name: str) -> str:
    """Return the API path of a CustomResourceDefinition."""
    return f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"


def service_proxy_path(namespace: str, service: str, path: str, port: int = 80) -> str:
    """Return the path that reaches a Service through the API server's proxy, without a route to the Service itself."""
    return f"/api/v1/namespaces/{namespace}/services/http:{service}:{port}/proxy/{path.lstrip('/')}"


def _get_outage(error: BaseException) -> Outage | None:
    return error.outage if isinstance(error, ClusterFailed) else None


def _find_outage(path: str, error: ApiException) -> Outage | None:
    """Return why a refusal passes. An error that the proxied Service answers says nothing about the API server."""
    if not is_passing_status(error.status or 0) or "/proxy/" in path:
        return None
    return Outage(f"HTTP {error.status}", parse_retry_after((error.headers or {}).get("Retry-After", "")))


def _contains(existing: Any, wanted: Any) -> bool:
    """Return whether an object has every field of a manifest; the server adds defaults, status and metadata."""
    if isinstance(wanted, dict):
        return isinstance(existing, dict) and all(_contains(existing.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        same_length = isinstance(existing, list) and len(existing) == len(wanted)
        return same_length and all(map(_contains, existing, wanted))
    return bool(existing == wanted)


def pod_proxy_path(namespace: str, pod: str, path: str, port: int) -> str:
    """Return the path that reaches one pod through the API server's proxy."""
    return f"/api/v1/namespaces/{namespace}/pods/http:{pod}:{port}/proxy/{path.lstrip('/')}"


def _parse_api_error(method: str, path: str, error: ApiException) -> ClusterFailed:
    try:
        reply = json.loads(error.body).get("message", "") if error.body else ""
    except (ValueError, AttributeError):
        reply = str(error.body)
    message = f"{method} {path}: HTTP {error.status}: {reply[:_QUOTED_CHARS] or error.reason}"
    if error.status == 404:
        return ObjectNotFound(message, 404)
    if error.status == 409:
        return Conflict(message, 409)
    if reply.startswith("admission webhook "):  # also answered with 403, like a missing permission
        return AdmissionDenied(f"{message}; the webhook refuses the object itself, no Role is missing", error.status)
    if error.status in (401, 403):
        verb = {"GET": "get", "POST": "create", "PUT": "update", "DELETE": "delete"}[method]
        return Forbidden(f"{message}; the account needs a Role that allows {verb!r} here", error.status)
    return ClusterFailed(message, error.status or 0, _find_outage(path, error))


def get_conditions(manifest: Mapping[str, Any]) -> dict[str, Json]:
    """Return {type: condition} of an object's status."""
    conditions = manifest.get("status", {}).get("conditions", ())
    return {condition["type"]: condition for condition in conditions}
