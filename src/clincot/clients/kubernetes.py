"""Kubernetes, as far as the project needs it. The only module that imports `kubernetes`.

Objects are plain JSON. Every failure is a ClusterFailed that names the request and what the API server said of it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

from clincot.errors import UserError

Json = dict[str, Any]
REQUEST_S = 30.0
UPDATE_ATTEMPTS = 5  # of a change that others' changes get ahead of
READ_ATTEMPTS, READ_RETRY_S = 4, 0.5  # tries of a read, and the pause before the second one (then doubled)
_QUOTED_CHARS = 300


class ClusterFailed(UserError, RuntimeError):
    """The API server refused, or could not be reached."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status  # of HTTP; 0: no reply


class ObjectNotFound(ClusterFailed):
    """There is no such object (or kind of object)."""


class Conflict(ClusterFailed):
    """The object was changed, or made, by someone else since it was read."""


class Forbidden(ClusterFailed):
    """The account may not do this; names verb and resource, for its Role."""


class Permission(NamedTuple):
    """What an account may have to do. namespace "": in the whole cluster; name "": whatever the object is called."""

    verb: str
    group: str
    resource: str  # "services", or with a subresource "services/proxy"
    namespace: str
    name: str = ""

    def __str__(self) -> str:
        resource = f"{self.resource}.{self.group}" if self.group else self.resource
        of = f" {self.name}" if self.name else ""
        return f"{self.verb} {resource}{of} in {self.namespace or 'the cluster'}"


def connect_cluster(context: str = "") -> Cluster:
    """The cluster of the pod we run in, or of the kubeconfig's (current) context."""
    configuration = client.Configuration()
    try:
        if not context and os.environ.get("KUBERNETES_SERVICE_HOST") and "KUBECONFIG" not in os.environ:
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(
                config_file=os.environ.get("KUBECONFIG"),  # the client itself looks at it once, when it is imported
                context=context or None,
                client_configuration=configuration,
            )
    except (ConfigException, OSError) as error:
        raise ClusterFailed(f"no cluster to connect to: {error}; set KUBECONFIG or run in a pod") from None
    return Cluster(client.ApiClient(configuration))


class Cluster:
    """A connection. Paths are those of the API: `resource_path` makes them."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    def get(self, path: str) -> Json:
        """Raises Missing."""
        return self.request("GET", path)

    def has_api(self, group: str, version: str) -> bool:
        """Does the cluster serve this API group (is its operator installed)?"""
        try:
            self.request("GET", f"/apis/{group}/{version}")
        except ObjectNotFound:
            return False
        return True

    def is_allowed(self, permission: Permission) -> bool:
        """Would the API server let this account do that? (SelfSubjectAccessReview: everyone may ask of themselves)"""
        resource, _, subresource = permission.resource.partition("/")
        about = {
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
            "spec": {"resourceAttributes": {key: value for key, value in about.items() if value}},
        }
        answer = self.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        return answer.get("status", {}).get("allowed") is True

    def create(self, path: str, manifest: Json) -> Json:
        """Raises Conflict where the object exists."""
        return self.request("POST", path.rpartition("/")[0], manifest)

    def delete(self, path: str) -> None:
        """Nothing happens where nothing is."""
        try:
            self.request("DELETE", path)
        except ObjectNotFound:
            return

    def update_with_retry(self, path: str, update: Callable[[Json], Json]) -> Json:
        """Read, update, write over what was read; again where someone else's change came first.

        `update` is given the object as it is, each time anew, and may raise where it is no longer what it should be.
        """
        for attempt in range(UPDATE_ATTEMPTS):
            before = self.get(path)
            after = update(json.loads(json.dumps(before)))
            if after == before:
                return before
            try:
                return self.request("PUT", path, after)
            except Conflict:
                if attempt == UPDATE_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def request(self, method: str, path: str, body: Json | None = None, *, timeout_s: float = REQUEST_S) -> Json:
        """One request to the API server; its JSON."""
        content = self.request_text(method, path, body, timeout_s=timeout_s)
        try:
            decoded: Json = json.loads(content) if content else {}
        except ValueError:
            raise ClusterFailed(f"{method} {path}: the reply is not JSON: {content[:_QUOTED_CHARS]!r}") from None
        return decoded

    def request_text(self, method: str, path: str, body: Json | None = None, *, timeout_s: float = REQUEST_S) -> str:
        """One request; what came. Reading is tried again where the server is busy or away for a moment."""
        for attempt in range(READ_ATTEMPTS if method == "GET" else 1):
            try:
                return self._send_once(method, path, body, timeout_s)
            except ClusterFailed as error:
                passing = error.status in (0, 429) or error.status >= 500
                if not passing or method != "GET" or attempt == READ_ATTEMPTS - 1:
                    raise
                time.sleep(READ_RETRY_S * 2**attempt)
        raise AssertionError("unreachable")

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
            raise ClusterFailed(f"{method} {path}: no reply from the API server: {type(error).__name__}") from None
        return content.decode("utf-8", errors="replace")

    def close(self) -> None:
        self._api.close()


def resource_path(group: str, version: str, namespace: str, plural: str, name: str = "") -> str:
    """The path of a namespaced object, or of its kind; group "" is the core API."""
    root = f"/apis/{group}/{version}" if group else f"/api/{version}"
    return f"{root}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


def crd_path(name: str) -> str:
    return f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"


def service_proxy_path(namespace: str, service: str, path: str, port: int = 80) -> str:
    """A request to a Service through the API server: nothing but its address and credentials are needed."""
    return f"/api/v1/namespaces/{namespace}/services/http:{service}:{port}/proxy/{path.lstrip('/')}"


def _parse_api_error(method: str, path: str, error: ApiException) -> ClusterFailed:
    try:
        said = json.loads(error.body).get("message", "") if error.body else ""
    except (ValueError, AttributeError):
        said = str(error.body)
    message = f"{method} {path}: HTTP {error.status}: {said[:_QUOTED_CHARS] or error.reason}"
    if error.status == 404:
        return ObjectNotFound(message, 404)
    if error.status == 409:
        return Conflict(message, 409)
    if error.status in (401, 403):
        verb = {"GET": "get", "POST": "create", "PUT": "update", "DELETE": "delete"}[method]
        return Forbidden(f"{message}; the account needs a Role that allows {verb!r} here", error.status)
    return ClusterFailed(message, error.status or 0)


def get_conditions(thing: Mapping[str, Any]) -> dict[str, Json]:
    """{type: condition} of an object's status."""
    return {one["type"]: one for one in thing.get("status", {}).get("conditions", ())}
