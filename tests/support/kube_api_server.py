"""A small stateful Kubernetes API server with a KServe controller behind it, for the real kubernetes client.

Objects have resourceVersion and generation as in Kubernetes; a write with an old resourceVersion gets 409. A `Script`
for each digest controls what happens to a checkpoint. Services are reached through the API server's proxy.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kubernetes import client

from clincot.clients.kubernetes import Cluster

Json = dict[str, Any]
PROXY = re.compile(r"/api/v1/namespaces/[^/]+/services/http:([^:]+):80/proxy(/.*)")


@dataclass
class Script:
    """The fate of a checkpoint: ready at the `ready_after`-th read (0: never), not ready `gone_after` reads later."""

    ready_after: int = 1
    gone_after: int = 0
    failure: str = ""  # the model cannot be loaded
    chat: Callable[[Json], tuple[int, Json]] | None = None
    metrics: Callable[[], str] | None = None
    looks: int = 0

    def look(self) -> bool:
        self.looks += 1
        ready = 0 < self.ready_after <= self.looks
        return ready and not (self.gone_after and self.looks >= self.ready_after + self.gone_after)


@dataclass
class ApiServer:
    scripts: dict[str, Script] = field(default_factory=dict)  # by digest
    objects: dict[str, Json] = field(default_factory=dict)  # by path
    groups: set[str] = field(default_factory=set)  # "group/version", in addition to KServe's own
    forbidden: set[tuple[str, str]] = field(default_factory=set)  # (method, part of the path)
    denied: set[tuple[str, str]] = field(default_factory=set)  # (verb, resource) that access reviews deny
    strict: dict[str, Callable[[Json], str]] = field(
        default_factory=dict
    )  # plural -> error of strict validation, or ""
    user: str = ""  # name of the account that asks; "": the server is too old to say
    conflicts: int = 0  # number of writes that find the object changed
    broken: int = 0  # number of reads that get a 503
    slow_s: float = 0.0
    requests: list[tuple[str, str]] = field(default_factory=list)
    history: list[Json] = field(default_factory=list)  # every InferenceService and Service written
    url: str = ""
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _version: int = 0
    _revisions: list[str] = field(default_factory=list)  # address that each Knative revision serves

    def handle(self, method: str, path: str, body: Json | None, query: str = "") -> tuple[int, Json | str]:
        with self._lock:
            self.requests.append((method, path))
            if any(method == m and part in path for m, part in self.forbidden):
                return 403, {"message": f'User "deployer" cannot do this to {path}'}
            if method == "GET" and self.broken:
                self.broken -= 1
                return 503, {"message": "etcd is electing a leader"}
            if proxied := PROXY.fullmatch(path):
                return self._proxy(proxied[1], proxied[2], body or {})
            if path.endswith("/selfsubjectreviews"):  # in authentication.k8s.io/v1 since Kubernetes 1.28
                known = {"status": {"userInfo": {"username": self.user}}}
                return (201, (body or {}) | known) if self.user else (404, {"message": "not found"})
            if path.endswith("/selfsubjectaccessreviews"):
                return 201, self._review(body or {})
            if method == "POST" and "fieldValidation=Strict" in query:
                plural = path.rpartition("/")[2]
                wrong = self.strict[plural](body or {}) if plural in self.strict else ""
                if wrong:
                    return 400, {"message": f"strict decoding error: {wrong}"}
            if "dryRun=All" in query:
                return 201, body or {}
            return self._api(method, path, body)

    def _review(self, body: Json) -> Json:
        asked = body["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource", ""))))
        return body | {"status": {"allowed": (asked["verb"], resource) not in self.denied}}

    def _api(self, method: str, path: str, body: Json | None) -> tuple[int, Json]:
        if path in {f"/apis/{group}" for group in self.groups}:
            return 200, {}
        if method == "POST":
            path = f"{path}/{(body or {})['metadata']['name']}"
            if path in self.objects:
                return 409, {"message": "already exists"}
            return 201, self._write(path, body or {})
        if path not in self.objects:
            items = [one for at, one in self.objects.items() if at.rpartition("/")[0] == path]
            return (200, {"items": items}) if items and method == "GET" else (404, {"message": "not found"})
        if method == "DELETE":
            return 200, self.objects.pop(path)
        if method == "PUT":
            return self._put(path, body or {})
        seen = copy.deepcopy(
            self.objects[path]
        )  # as the controller left it: the status lags behind the spec by one read
        self._reconcile(self.objects[path])
        return 200, seen

    def _put(self, path: str, body: Json) -> tuple[int, Json]:
        if self.conflicts:
            self.conflicts -= 1
            self._write(path, self.objects[path])
        if body["metadata"].get("resourceVersion") != self.objects[path]["metadata"]["resourceVersion"]:
            return 409, {"message": "the object has been modified"}
        return 200, self._write(path, body)

    def _write(self, path: str, body: Json) -> Json:
        before = self.objects.get(path, {"spec": None, "metadata": {"generation": 0}})
        self._version += 1
        written = copy.deepcopy(body)
        generation = before["metadata"]["generation"] + (before["spec"] != body.get("spec"))
        written["metadata"] |= {"resourceVersion": str(self._version), "generation": generation}
        written["status"] = copy.deepcopy(before.get("status", {}))
        self.objects[path] = written
        self.history.append(copy.deepcopy(written))
        return written

    def _reconcile(self, thing: Json) -> None:
        """KServe's controller, which runs at each read: set the status from spec and script."""
        if thing.get("kind") != "InferenceService":
            return
        status, spec = thing["status"], thing["spec"]
        status["observedGeneration"] = 1  # KServe reports the Deployment's generation
        ready, model_status = self._state(spec["predictor"])
        status["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}]
        status["modelStatus"] = model_status
        status["canaryStatuses"] = [self._canary(one) for one in spec.get("canary", ())]
        uri = spec["predictor"]["model"]["storageUri"]
        if self._revisions[-1:] != [uri]:
            self._revisions.append(uri)
        name = f"{thing['metadata']['name']}-{len(self._revisions):05d}"
        part = status.setdefault("components", {}).setdefault("predictor", {})
        part["latestCreatedRevision"] = name
        if ready:
            part["latestReadyRevision"] = name
            if spec["predictor"].get("canaryTrafficPercent", 100) == 100:
                part["latestRolledoutRevision"] = name
        part["traffic"] = [{"latestRevision": True, "tag": "latest", "url": f"{self.url}/knative/{uri[-64:]}"}]

    def _state(self, predictor: Json) -> tuple[bool, Json]:
        script = self.script(predictor["model"]["storageUri"])
        if script.failure:
            info = {"message": script.failure, "reason": "ModelLoadFailed"}
            return False, {"transitionStatus": "BlockedByFailedLoad", "lastFailureInfo": info}
        return script.look(), {"transitionStatus": "UpToDate"}

    def _canary(self, entry: Json) -> Json:
        ready, model_status = self._state(entry["predictor"])
        return {
            "name": entry["predictor"]["name"],
            "ready": ready,
            "trafficPercent": entry["trafficPercent"],
            "modelStatus": model_status,
        }

    def script(self, uri: str) -> Script:
        return self.scripts.setdefault(uri[-64:], Script())

    def reached(self, service: str, path: str, body: Json) -> tuple[int, Json | str]:
        with self._lock:
            return self._proxy(service, path, body)

    def _proxy(self, service: str, path: str, body: Json) -> tuple[int, Json | str]:
        digest = next((d for d in self.scripts if f"r{d[:10]}" in service), "")
        return self.answer(digest, path, body) if digest else (503, {"message": f"no endpoints for {service}"})

    def answer(self, digest: str, path: str, body: Json) -> tuple[int, Json | str]:
        script = self.scripts[digest]
        if path == "/metrics":
            return (200, script.metrics()) if script.metrics else (404, {"message": "no metrics"})
        return script.chat(body) if script.chat else (500, {"error": "down"})


@contextlib.contextmanager
def api_server(server: ApiServer) -> Iterator[Cluster]:
    """Run the server on a free port; yields a real client."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            if server.slow_s:
                stopping.wait(server.slow_s)
            path, _, query = self.path.partition("?")
            if path.startswith("/knative/"):
                _, _, digest, rest = path.split("/", 3)
                status, reply = server.answer(digest, f"/{rest}", body or {})
            elif path.startswith("/own/"):  # a Service by its own address, not through the API server
                _, _, service, rest = path.split("/", 3)
                status, reply = server.reached(service, f"/{rest}", body or {})
            else:
                status, reply = server.handle(self.command, path, body, query)
            content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    stopping = threading.Event()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    configuration = client.Configuration(host=server.url)
    cluster = Cluster(client.ApiClient(configuration))
    try:
        yield cluster
    finally:
        cluster.close()
        stopping.set()
        http.shutdown()
        thread.join()
        http.server_close()
