"""As much of a Kubernetes API server as Helm needs: discovery, objects by path, jobs and pods that succeed at once."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Json = dict[str, Any]
KINDS = {  # group/version -> kind -> plural; a * before: of the whole cluster
    "v1": {
        "Namespace": "*namespaces",
        "Secret": "secrets",
        "ConfigMap": "configmaps",
        "Service": "services",
        "ServiceAccount": "serviceaccounts",
        "Pod": "pods",
        "PersistentVolumeClaim": "persistentvolumeclaims",
        "ResourceQuota": "resourcequotas",
        "LimitRange": "limitranges",
    },
    "apps/v1": {"Deployment": "deployments", "StatefulSet": "statefulsets"},
    "batch/v1": {"Job": "jobs"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"},
    "gateway.networking.k8s.io/v1": {"HTTPRoute": "httproutes"},
    "gateway.networking.k8s.io/v1beta1": {"ReferenceGrant": "referencegrants"},
    "rbac.authorization.k8s.io/v1": {
        "Role": "roles",
        "RoleBinding": "rolebindings",
        "ClusterRole": "*clusterroles",
        "ClusterRoleBinding": "*clusterrolebindings",
    },
    "serving.kserve.io/v1beta1": {"InferenceService": "inferenceservices"},
    "serving.kserve.io/v1alpha1": {
        "ServingRuntime": "servingruntimes",
        "ClusterStorageContainer": "*clusterstoragecontainers",
    },
    "argoproj.io/v1alpha1": {"Workflow": "workflows"},
}
DONE = {"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1}
FAILED = {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}], "failed": 1}


@dataclass
class KubeServer:
    objects: dict[str, Json] = field(default_factory=dict)  # by path
    ran: list[list[str]] = field(default_factory=list)  # arguments of every container of jobs and pods, in their order
    absent: frozenset[str] = frozenset()  # groups that are not installed
    failing: frozenset[str] = frozenset()  # names of the Jobs that fail
    written: list[tuple[str, str]] = field(default_factory=list)  # (method, path) of everything but reads
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self, plural: str) -> set[str]:
        return {path.rpartition("/")[2] for path in self.objects if path.split("/")[-2] == plural}

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Json) -> tuple[int, Json]:
        with self._lock:
            if method == "GET":
                return self._get(path, query)
            self.written.append((method, path))
            if method == "POST":
                return self._create(f"{path}/{body['metadata']['name']}", body)
            if path not in self.objects:  # Helm 4 applies on the server's side, where nothing is, too
                return self._create(path, body) if method == "PATCH" else _status(404, path)
            if method == "DELETE":
                self._collect_garbage(path)
                return 200, self.objects.pop(path)
            merged = body if method == "PUT" else _merged(self.objects[path], body)
            self.objects[path] = merged
            return 200, merged

    def _create(self, path: str, body: Json) -> tuple[int, Json]:
        if path in self.objects:
            return 409, _status(409, path)[1] | {"reason": "AlreadyExists"}
        body["metadata"] |= {"uid": f"u{len(self.written)}", "resourceVersion": str(len(self.written))}
        if body["kind"] in ("Job", "Pod"):
            spec = body["spec"]["template"]["spec"] if body["kind"] == "Job" else body["spec"]
            self.ran += [one["args"] for one in (*spec.get("initContainers", ()), *spec["containers"])]
            body["status"] = DONE if body["kind"] == "Job" else {"phase": "Succeeded"}
        if body["kind"] == "Job" and body["metadata"]["name"] in self.failing:
            self._fail(path, body)
        self.objects[path] = body
        return 201, body

    def _fail(self, path: str, job: Json) -> None:
        """A Job whose tries are used up, with the pod of one of them."""
        job["status"] = FAILED
        name = job["metadata"]["name"]
        about = {"name": f"{name}-x1", "namespace": job["metadata"]["namespace"], "labels": {"job-name": name}}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": job["spec"]["template"]["spec"]}
        self.objects[f"{path.rpartition('/jobs/')[0].replace('/apis/batch/v1', '/api/v1')}/pods/{name}-x1"] = pod

    def _collect_garbage(self, path: str) -> None:
        """Delete the pods of a deleted Job."""
        if self.objects[path]["kind"] == "Job":
            name = path.rpartition("/")[2]
            pods = [at for at, one in self.objects.items() if one["metadata"].get("labels", {}).get("job-name") == name]
            for pod in pods:
                del self.objects[pod]

    def _get(self, path: str, query: dict[str, list[str]]) -> tuple[int, Json]:
        if (found := discovery(path, self.absent)) is not None:
            return 200, found
        if path in self.objects:
            return 200, self.objects[path]
        plurals = {plural.lstrip("*") for kinds in KINDS.values() for plural in kinds.values()}
        if path.rpartition("/")[2] not in plurals:
            return _status(404, path)
        wanted = dict(one.split("=") for one in query.get("labelSelector", [""])[0].split(",") if one)
        named = query.get("fieldSelector", [""])[0].partition("metadata.name=")[2]
        items = [
            one
            for at, one in self.objects.items()
            if at.rpartition("/")[0] == path
            and (not named or one["metadata"]["name"] == named)
            and wanted.items() <= one["metadata"].get("labels", {}).items()
        ]
        kind, version = (items[0]["kind"], items[0]["apiVersion"]) if items else ("", "v1")
        return 200, {"kind": f"{kind}List", "apiVersion": version, "metadata": {"resourceVersion": "1"}, "items": items}


def decoded(content: bytes) -> Json:
    """A request's body: JSON, or in protobuf (k8s.io/api/core/v1/generated.proto) the Secret that holds a release."""
    if not content.startswith(b"k8s\0"):
        found: Json = yaml.load(content, Loader=yaml.CSafeLoader) or {}  # what is applied may be YAML
        return found
    unknown = _fields(content[4:])  # runtime.Unknown: 1 typeMeta, 2 raw
    secret = _fields(unknown[2][0])  # Secret: 1 metadata, 2 data, 3 type
    about = _fields(secret[1][0])  # ObjectMeta: 1 name, 3 namespace, 11 labels
    pairs = {_fields(one)[1][0].decode(): _fields(one)[2][0] for one in secret.get(2, ())}
    labels = [_fields(one) for one in about.get(11, ())]
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": secret[3][0].decode(),
        "metadata": {
            "name": about[1][0].decode(),
            "namespace": about[3][0].decode(),
            "labels": {one[1][0].decode(): one[2][0].decode() for one in labels},
        },
        "data": {name: base64.b64encode(value).decode() for name, value in pairs.items()},
    }


def _fields(message: bytes) -> dict[int, list[bytes]]:
    """{number: its values} of the fields of a protobuf message that have a length; numbers are passed over."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value, at

    found: dict[int, list[bytes]] = {}
    at = 0
    while at < len(message):
        key, at = varint(at)
        size, at = varint(at)
        if key & 7 == 2:
            found.setdefault(key >> 3, []).append(message[at : at + size])
            at += size
    return found


def discovery(path: str, absent: frozenset[str]) -> Json | None:
    """The answer to a question about what the server has; None: it is none."""
    groups = sorted({version.split("/")[0] for version in KINDS if "/" in version} - absent)
    if path == "/version":
        return {"major": "1", "minor": "33", "gitVersion": "v1.33.1"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = []
        for group in groups:
            versions = [{"groupVersion": v, "version": v.split("/")[1]} for v in KINDS if v.startswith(f"{group}/")]
            listed.append({"name": group, "versions": versions, "preferredVersion": versions[0]})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    if path == "/openapi/v3":
        return {"paths": {_at(v).lstrip("/"): {"serverRelativeURL": f"/openapi/v3{_at(v)}"} for v in KINDS}}
    version = path.removeprefix("/openapi/v3").removeprefix("/apis/").removeprefix("/api/")
    if version not in KINDS:
        return None
    if path.startswith("/openapi/v3/"):
        return _takes_field_validation(version)
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {
            "name": plural.lstrip("*"),
            "singularName": "",
            "namespaced": not plural.startswith("*"),
            "kind": kind,
            "verbs": verbs,
        }
        for kind, plural in KINDS[version].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _at(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _takes_field_validation(version: str) -> Json:
    """An OpenAPI document that says so: Helm then leaves it to the server to refuse fields that are not known."""
    group, _, number = version.rpartition("/")
    patches = {
        f"{_at(version)}/namespaces/{{namespace}}/{plural.lstrip('*')}/{{name}}": {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "responses": {},
                "x-kubernetes-group-version-kind": {"group": group, "version": number, "kind": kind},
            }
        }
        for kind, plural in KINDS[version].items()
    }
    return {"openapi": "3.0.0", "info": {"title": "as much as is asked for", "version": "1"}, "paths": patches}


def _merged(below: Any, above: Any) -> Any:
    """A merge patch."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    out = {key: value for key, value in below.items() if above.get(key, 0) is not None}
    return out | {key: _merged(below.get(key), value) for key, value in above.items() if value is not None}


def _status(code: int, path: str) -> tuple[int, Json]:
    reason = {404: "NotFound", 409: "AlreadyExists"}[code]
    return code, {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "code": code,
        "message": f"{path}: {reason}",
    }


@contextlib.contextmanager
def kube_server(server: KubeServer, folder: Path) -> Iterator[Path]:
    """The server on a free port; gives the kubeconfig that names it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            content = self.rfile.read(length)
            body = decoded(content) if self.command in ("POST", "PUT", "PATCH") else {}
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            if "watch" in query:  # nothing more happens to what was listed
                self.close_connection = True
                code, reply = 200, b""
            elif url.path.endswith("/log"):
                there = url.path.removesuffix("/log") in server.objects
                code, reply = (200, b"said by the pod\n") if there else (404, b'{"message": "no such pod"}')
            else:
                code, found = server.handle(self.command, url.path, query, body)
                reply = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            if self.close_connection:
                self.send_header("Connection", "close")
            with contextlib.suppress(ConnectionError):  # whoever asked has gone
                self.end_headers()
                self.wfile.write(reply)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "it",
        "clusters": [{"name": "it", "cluster": {"server": f"http://127.0.0.1:{http.server_address[1]}"}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "users": [{"name": "it", "user": {}}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    try:
        yield path
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
