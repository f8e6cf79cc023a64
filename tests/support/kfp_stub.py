"""A small Kubeflow Pipelines API: it keeps state, checks the bodies it is sent, and can break off before any change.

Pipelines follow the rules of the real server (kubeflow/pipelines 2.17.0, backend/src/apiserver): a name is unique
within a namespace (model/pipeline.go), a list holds the pipelines of exactly one namespace, which without one in the
request is that of the shared pipelines (server/pipeline_server.go: listPipelines), and a single-user server ignores
namespaces (resource/resource_manager.go: ReplaceNamespace).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml

Json = dict[str, Any]
# Bodies of errors and health checks as the API server of Kubeflow Pipelines 2.17.0 (kubeflow/pipelines, its own
# manifests, on Kubernetes 1.34.4) answered them; the Go stack is shortened to three frames.
RECORDED: dict[str, Json] = json.loads((Path(__file__).parent / "kfp_answers.json").read_text(encoding="utf-8"))
RUN = {"experiment_id", "display_name", "pipeline_spec", "runtime_config", "service_account"}
RECURRING = {
    "experiment_id",
    "display_name",
    "description",
    "mode",
    "pipeline_version_reference",
    "runtime_config",
    "trigger",
    "max_concurrency",
    "no_catchup",
    "service_account",
}


class Refused(Exception):
    """The stub answers with this status and body."""

    def __init__(self, status: int, body: Json) -> None:
        super().__init__(status, body)
        self.status, self.body = status, body


class PipelinesStub:
    """Server state and its switches.

    token: the only one that is let in; version: the tag_name of the health check; break_before: from this change
    (1, 2, …) on there is no answer; refusal: status and body of every answer but the health check.
    """

    def __init__(self, *, token: str = "", multi_user: bool = False, version: str = "2.17.0") -> None:
        self.token, self.multi_user, self.version = token, multi_user, version
        self.refusal: tuple[int, str] | None = None
        self.experiments: list[Json] = []
        self.pipelines: list[Json] = []
        self.versions: list[Json] = []
        self.runs: list[Json] = []
        self.recurring: list[Json] = []
        self.changes: list[str] = []
        self.break_before = 0
        self.url = ""
        self._made = 0

    def new_id(self, kind: str) -> str:
        self._made += 1
        return f"{kind}-{self._made}"

    def get(self, path: str, query: dict[str, list[str]]) -> Json:
        if path == "/healthz":
            recorded = RECORDED["healthz, multi-user" if self.multi_user else "healthz, single-user"]
            return {**recorded, "tag_name": self.version}
        if path == "/experiments":
            return {"experiments": _filtered(self.experiments, query)}
        if path == "/pipelines":
            namespace = self._replace_namespace(query)
            return {"pipelines": _filtered([one for one in self.pipelines if one["namespace"] == namespace], query)}
        if match := re.fullmatch(r"/pipelines/([^/]+)/versions", path):
            return {"pipeline_versions": [v for v in self.versions if v["pipeline_id"] == match[1]]}
        if path == "/recurringruns":  # in pages of one, as a long list would come
            at = int(query.get("page_token", ["0"])[0] or 0)
            more = {"next_page_token": str(at + 1)} if at + 1 < len(self.recurring) else {}
            return {"recurringRuns": self.recurring[at : at + 1], **more}
        if path == "/runs":
            return {"runs": self.runs[::-1]}
        if path.startswith("/runs/"):
            return _named(self.runs, "run_id", path.rpartition("/")[2])
        raise KeyError(path)

    def post(self, path: str, query: dict[str, list[str]], body: Any) -> Json:
        if match := re.fullmatch(r"/recurringruns/([^:]+):(enable|disable)", path):
            found = _named(self.recurring, "recurring_run_id", match[1])
            found["mode"], found["status"] = match[2].upper(), f"{match[2].upper()}D"
            return {}
        if path == "/pipelines/upload":
            key = {"namespace": self._replace_namespace(query), "name": query["name"][0]}
            if any(key.items() <= one.items() for one in self.pipelines):
                raise Refused(409, RECORDED["upload of a name that exists (409)"])
            self.pipelines.append({**key, "pipeline_id": self.new_id("pipeline"), "display_name": key["name"]})
            return self.pipelines[-1]
        if path == "/pipelines/upload_version":
            pipeline = _named(self.pipelines, "pipeline_id", query["pipelineid"][0])["pipeline_id"]
            if any((one["pipeline_id"], one["display_name"]) == (pipeline, query["name"][0]) for one in self.versions):
                raise Refused(
                    409, {"error_message": "Failed to create a pipeline version"}
                )  # model/pipeline_version.go
            version = {"pipeline_version_id": self.new_id("version"), "pipeline_id": pipeline}
            self.versions.append({**version, "display_name": query["name"][0], "spec": _uploaded(body)})
            return {name: value for name, value in self.versions[-1].items() if name != "spec"}
        return self._created(path, body)

    def _replace_namespace(self, query: dict[str, list[str]]) -> str:
        return query.get("namespace", [""])[0] if self.multi_user else ""

    def _created(self, path: str, body: Json) -> Json:
        if path == "/experiments":
            self.experiments.append({**body, "experiment_id": self.new_id("experiment")})
            return self.experiments[-1]
        _named(self.experiments, "experiment_id", body["experiment_id"])
        if path == "/runs":
            assert set(body) <= RUN, set(body) - RUN
            assert body["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "round"
            self.runs.append({**body, "run_id": self.new_id("run"), "state": "PENDING"})
            return self.runs[-1]
        if path == "/recurringruns":
            assert set(body) <= RECURRING, set(body) - RECURRING
            assert (body["mode"], body["no_catchup"]) == ("ENABLE", True)
            assert body["max_concurrency"] in (1, "1")
            version = body["pipeline_version_reference"]
            assert _named(self.versions, "pipeline_version_id", version["pipeline_version_id"])
            made = {"recurring_run_id": self.new_id("recurring"), "status": "ENABLED"}
            self.recurring.append({**body, **made, "created_at": f"2026-01-01T00:00:{self._made:02d}Z"})
            return self.recurring[-1]
        raise KeyError(path)

    def delete(self, path: str) -> Json:
        found = _named(self.recurring, "recurring_run_id", path.rpartition("/")[2])
        assert found["mode"] == "DISABLE", "it is disabled before it is deleted"
        self.recurring.remove(found)
        return {}


def _named(things: list[Json], key: str, value: str) -> Json:
    return next(thing for thing in things if thing[key] == value)


def _filtered(things: list[Json], query: dict[str, list[str]]) -> list[Json]:
    if "filter" not in query:
        return things
    (wanted,) = json.loads(query["filter"][0])["predicates"]
    return [thing for thing in things if thing[wanted["key"]] == wanted["stringValue"]]


def _uploaded(body: bytes) -> Json:
    """The pipeline of a multipart upload."""
    text = body.decode().split("\r\n\r\n", 1)[1].rpartition("\r\n--")[0]
    spec: Json = next(iter(yaml.safe_load_all(text)))
    return spec


class _Handler(BaseHTTPRequestHandler):
    stub: PipelinesStub

    def _answer(self) -> None:
        parsed = urlparse(self.path)
        path, query = parsed.path.removeprefix("/apis/v2beta1"), parse_qs(parsed.query)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        stub = self.stub
        if stub.token and self.headers.get("Authorization") != f"Bearer {stub.token}":
            self._send(401, {"error": "token is expired"})
            return
        if stub.refusal is not None and path != "/healthz":
            self._send_text(*stub.refusal)
            return
        if self.command != "GET":
            if stub.break_before and len(stub.changes) + 1 >= stub.break_before:  # the client tries some things again
                self.connection.close()
                return
            stub.changes.append(f"{self.command} {path}")
        try:
            if self.command == "GET":
                reply = stub.get(path, query)
            elif self.command == "DELETE":
                reply = stub.delete(path)
            else:
                body = raw if "upload" in path else json.loads(raw or b"{}")
                reply = stub.post(path, query, body)
        except (KeyError, StopIteration):
            self._send(404, {"error": f"nothing at {self.path}"})
        except Refused as refused:
            self._send(refused.status, refused.body)
        except AssertionError as error:
            self._send(400, {"error": f"refused: {error}"})
        else:
            self._send(200, reply)

    do_GET = do_POST = do_DELETE = _answer

    def _send(self, status: int, body: Json) -> None:
        self._send_text(status, json.dumps(body))

    def _send_text(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *about: object) -> None:
        return


@contextmanager
def serving(stub: PipelinesStub) -> Iterator[PipelinesStub]:
    """The stub on a free port of 127.0.0.1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
