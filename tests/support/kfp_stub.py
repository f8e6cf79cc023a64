"""A small Kubeflow Pipelines API that keeps state and follows the rules of the real server.

Every rule names its file in kubeflow/pipelines at 2.17.0 (below backend/src/apiserver unless it says otherwise), and
tests/pipelines/test_kfp_stub.py shows that the stub refuses what the server refuses. Beyond that it can break off
before any change, and replay recorded runs (tests/support/kfp_recordings/).
"""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import yaml
from google.protobuf.json_format import ParseError

from tests.support.kfp_specs import choose_release, read_document

Json = dict[str, Any]
Query = dict[str, str]
FOLDER = Path(__file__).parent
# Bodies of errors and health checks as the API server of Kubeflow Pipelines 2.17.0 (kubeflow/pipelines, its own
# manifests, on Kubernetes 1.34.4) answered them; the Go stack is shortened to three frames.
RECORDED: dict[str, Json] = json.loads((FOLDER / "kfp_answers.json").read_text(encoding="utf-8"))
RUN_FIELDS = {
    "experiment_id",
    "display_name",
    "description",
    "pipeline_spec",
    "pipeline_version_reference",
    "runtime_config",
    "service_account",
}
RECURRING_FIELDS = RUN_FIELDS | {"mode", "trigger", "max_concurrency", "no_catchup", "namespace"}
NAME_CHARS = {"pipelines": 128, "versions": 127, "experiments": 128}  # validation/length.go
PAGE_SIZE, MAX_PAGE_SIZE = 20, 200  # list/list.go
FILTER_KEYS = {
    "pipelines": {"name", "display_name"},
    "experiments": {"display_name"},
}  # model/pipeline.go, experiment.go
STATUS_OF_CODE = {3: 400, 5: 404, 6: 409, 7: 403, 13: 500, 16: 401}  # grpc-gateway: HTTPStatusFromCode
PARAMETER_KINDS: dict[str, tuple[type, ...]] = {
    "NUMBER_DOUBLE": (int, float),
    "NUMBER_INTEGER": (int, float),
    "STRING": (str,),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}


def load_recording(name: str) -> Json:
    """Return a recorded answer of the server: run-succeeded, run-failed-in-decide, recurring-runs, pipeline, ..."""
    recording: Json = json.loads((FOLDER / "kfp_recordings" / f"{name}.json").read_text(encoding="utf-8"))
    return recording


class Refused(Exception):
    """The stub answers with this status and body."""

    def __init__(self, status: int, body: Json) -> None:
        super().__init__(status, body)
        self.status, self.body = status, body


def refuse(code: int, message: str) -> Refused:
    """The gateway's form of an error; `code` is that of gRPC (src/common/util/error.go: ToGRPCError)."""
    detail = {"@type": "type.googleapis.com/google.rpc.Status", "code": code, "message": message}
    return Refused(STATUS_OF_CODE[code], {"code": code, "message": message, "details": [detail]})


def refuse_upload(status: int, message: str) -> Refused:
    """The upload server's form of an error (server/pipeline_upload_server.go: writeErrorToResponse)."""
    stack = f"{message}\ngithub.com/kubeflow/pipelines/backend/src/apiserver/server.(*PipelineUploadServer)\n\tx.go:1"
    return Refused(status, {"error_message": message, "error_details": stack})


class PipelinesStub:
    """Server state and its switches.

    token: the only one that is let in. multi_user: runs and pipelines belong to namespaces. version: the tag_name of
    the health check, and, unless it is "unknown", what the server understands. understands: that of a server whose
    image reports no version. allowed: namespaces in which the user may do everything; None: all. break_before: from
    this change (1, 2, ...) on there is no answer. refusal: status and body of every answer but the health check.
    logs: {name of a pod or id of a node: its log}. behind_gateway: requests pass through the UI, which knows only the
    paths of v1beta1 and v2beta1, and one of its own for logs (frontend/server/app.ts).
    """

    def __init__(
        self, *, token: str = "", multi_user: bool = False, version: str = "2.17.0", understands: str = ""
    ) -> None:
        self.token, self.multi_user, self.version = token, multi_user, version
        self.release = choose_release(understands or version)
        self.allowed: set[str] | None = None
        self.refusal: tuple[int, str] | None = None
        self.redirect = ""
        self.experiments: list[Json] = []
        self.pipelines: list[Json] = []
        self.versions: list[Json] = []
        self.runs: list[Json] = []
        self.recurring: list[Json] = []
        self.logs: dict[str, str] = {}
        self.behind_gateway = False
        self.changes: list[str] = []
        self.break_before = 0
        self.before_change: Callable[[str], None] = lambda change: None
        self.url = ""
        self._made = 0

    def new_id(self, kind: str) -> str:
        self._made += 1
        return f"{kind}-{self._made}"

    # what is asked for

    def get(self, path: str, query: Query) -> Json:
        kind, *rest = path.strip("/").split("/")
        if kind == "healthz":
            recorded = RECORDED["healthz, multi-user" if self.multi_user else "healthz, single-user"]
            return {**recorded, "tag_name": self.version}
        if kind == "experiments":
            return self._list("experiments", self.experiments, query, self._find_namespace(query, "experiments"))
        if kind == "pipelines" and not rest:
            return self._list("pipelines", self.pipelines, query, self._find_namespace(query, "pipelines"))
        if kind == "pipelines" and rest[1:] == ["versions"]:
            pipeline = self._find_pipeline(rest[0])
            found = [one for one in self.versions if one["pipeline_id"] == pipeline["pipeline_id"]]
            return _page("pipeline_versions", found[::-1], query)
        if kind == "pipelines" and len(rest) == 3:
            self._find_pipeline(rest[0])
            return _find(self.versions, "pipeline_version_id", rest[2], "PipelineVersion")
        if kind in ("runs", "recurringruns") and not rest:
            return self._list_of_experiment(kind, query)
        if kind == "runs" and len(rest) == 1:
            return self._show_run(self._find_run(rest[0]))
        raise refuse(5, "Not Found")

    def post(self, path: str, query: Query, body: Any) -> Json:
        kind, *rest = path.strip("/").split("/")
        if path == "/pipelines/upload":
            return self._upload_pipeline(query, body)
        if path == "/pipelines/upload_version":
            return self._upload_version(query, body)
        if kind == "experiments":
            return self._create_experiment(body)
        if kind == "runs" and not rest:
            return self._create_run(body)
        if kind == "runs":
            return self._terminate_run(*rest[0].split(":"))
        if kind == "recurringruns" and not rest:
            return self._create_recurring_run(body)
        return self._change_mode(*rest[0].split(":"))

    def delete(self, path: str) -> Json:
        """server/job_server.go: an enabled recurring run can be deleted. Shared pipelines: canAccessPipeline."""
        kind, which = path.strip("/").split("/")
        if kind == "pipelines":
            pipeline = _find(self.pipelines, "pipeline_id", which, "Pipeline")
            if self.multi_user and not pipeline["namespace"] and self.allowed is not None:
                raise Refused(403, RECORDED["a user of a profile deletes a shared pipeline (403)"])
            self.pipelines.remove(pipeline)
            return {}
        self.recurring.remove(self._find_recurring(which))
        return {}

    def log(self, run_id: str, node: str) -> str:
        """server/run_log_server.go: the status 200 is sent before the log is looked for; an error follows as JSON."""
        self._find_run(run_id)
        if node in self.logs:
            return self.logs[node]
        message = f"Failed to read logs for run {run_id}: InternalServerError: pods {node!r} not found"
        return json.dumps({"error_message": message, "error_details": f"{message}\ngithub.com/kubeflow/pipelines"})

    # rules of namespaces

    def _find_namespace(self, query: Query, kind: str) -> str:
        """resource/resource_manager.go: ReplaceNamespace: a single-user server ignores namespaces.

        server/pipeline_server.go: a list without a namespace is that of the shared pipelines, which all may read.
        server/experiment_server.go: there is no such list of experiments.
        """
        namespace = query.get("namespace", "") if self.multi_user else ""
        if namespace or kind != "pipelines":
            self._authorize(namespace, f"list {kind}")
        return namespace

    def _authorize(self, namespace: str, doing: str) -> None:
        """resource/resource_manager.go: IsAuthorized asks Kubernetes with a SubjectAccessReview."""
        if not self.multi_user:
            return
        if not namespace:
            raise refuse(3, f"Failed to {doing}: it cannot have an empty namespace in multi-user mode")
        if self.allowed is not None and namespace not in self.allowed:
            raise refuse(
                7, f"User 'user@example.com' is not authorized with reason:  (request: {doing} in {namespace})"
            )

    def _find_pipeline(self, pipeline_id: str) -> Json:
        pipeline = _find(self.pipelines, "pipeline_id", pipeline_id, "Pipeline")
        if pipeline["namespace"]:
            self._authorize(pipeline["namespace"], "access the pipeline")
        return pipeline

    def _find_experiment(self, experiment_id: str) -> Json:
        """resource/resource_manager.go: GetValidExperimentNamespacePair."""
        if not experiment_id:
            raise refuse(3, "Experiment id can not be empty in multi-user mode")
        return _find(self.experiments, "experiment_id", experiment_id, "Experiment")

    def _find_run(self, run_id: str) -> Json:
        run = _find(self.runs, "run_id", run_id, "Run")
        self._authorize(self._find_experiment(run["experiment_id"])["namespace"], "get the run")
        return run

    def _find_recurring(self, recurring_id: str) -> Json:
        found = _find(self.recurring, "recurring_run_id", recurring_id, "Job")
        self._authorize(found["namespace"], "change the recurring run")
        return found

    # lists

    def _list(self, kind: str, things: list[Json], query: Query, namespace: str) -> Json:
        found = [one for one in things if one["namespace"] == namespace]
        return _page(kind, _filter(found, query, FILTER_KEYS[kind]), query)

    def _list_of_experiment(self, kind: str, query: Query) -> Json:
        """server/job_server.go: listJobs, server/run_server.go: listRuns: by experiment, or else by namespace.

        storage/job_store.go: a single-user server without an experiment lists all.
        """
        things, name = (self.runs, "runs") if kind == "runs" else (self.recurring, "recurringRuns")
        if "experiment_id" in query:
            experiment = self._find_experiment(query["experiment_id"])
            self._authorize(experiment["namespace"], f"list {kind}")
            found = [one for one in things if one["experiment_id"] == experiment["experiment_id"]]
        else:
            namespace = self._find_namespace(query, kind)
            found = [one for one in things if not self.multi_user or one["namespace"] == namespace]
        if query.get("sort_by", "").endswith("desc"):
            found = found[::-1]
        return _page(name, [self._show_run(one) for one in found] if kind == "runs" else found, query)

    def _show_run(self, run: Json) -> Json:
        """server/api_converter.go: toApiRun: the spec of a run from a version is not part of the answer."""
        hidden = {"namespace", "pipeline_spec"} if run.get("pipeline_version_reference") else {"namespace"}
        return {name: value for name, value in run.items() if name not in hidden}

    # changes

    def _upload_pipeline(self, query: Query, body: bytes) -> Json:
        """server/pipeline_upload_server.go: uploadPipeline.

        The name is unique within a namespace (model/pipeline.go), and the upload makes the first version, under the
        name of the pipeline (resource/resource_manager.go: CreatePipelineAndPipelineVersion).
        """
        namespace = query.get("namespace", "") if self.multi_user else ""
        if self.allowed is not None and namespace not in self.allowed:
            raise refuse_upload(400, "Failed to create a pipeline")  # not 403
        _check_length("pipelines", query["name"])
        spec = self._read_pipeline(body)
        key = {"namespace": namespace, "name": query["name"]}
        if any(key.items() <= one.items() for one in self.pipelines):
            raise Refused(409, RECORDED["upload of a name that exists (409)"])
        about = {"display_name": query["name"], "description": query.get("description", "")}
        self.pipelines.append({**key, "pipeline_id": self.new_id("pipeline"), **about})
        self._add_version(self.pipelines[-1]["pipeline_id"], query["name"], spec)
        return self.pipelines[-1]

    def _upload_version(self, query: Query, body: bytes) -> Json:
        """server/pipeline_upload_server.go: uploadPipelineVersion; the name is unique: model/pipeline_version.go."""
        pipeline = next((one for one in self.pipelines if one["pipeline_id"] == query["pipelineid"]), None)
        if pipeline is None or (self.allowed is not None and pipeline["namespace"] not in self.allowed):
            raise refuse_upload(400, "Failed to create a pipeline version")  # neither 404 nor 403
        _check_length("versions", query["name"])
        spec = self._read_pipeline(body)
        taken = {one["name"] for one in self.versions if one["pipeline_id"] == pipeline["pipeline_id"]}
        if query["name"] in taken:
            raise refuse_upload(409, "Failed to create a pipeline version")
        return self._add_version(pipeline["pipeline_id"], query["name"], spec)

    def _add_version(self, pipeline_id: str, name: str, spec: Json) -> Json:
        made = {"pipeline_version_id": self.new_id("version"), "pipeline_id": pipeline_id}
        self.versions.append({**made, "name": name, "display_name": name, "pipeline_spec": spec})
        return self.versions[-1]

    def _read_pipeline(self, body: bytes) -> Json:
        """template/v2_template.go: NewV2SpecTemplate, and Bytes, which is what is stored.

        server/api_util.go: YamlStringToPipelineSpecStruct: the spec alone, if there is no platform spec.
        """
        text = body.decode().split("\r\n\r\n", 1)[1].rpartition("\r\n--")[0]
        try:
            stored = read_document(self.release, list(yaml.safe_load_all(text)))
        except (ParseError, ValueError) as error:
            raise refuse_upload(400, f"Invalid input error: invalid v2 pipeline spec: {error}") from None
        return stored if "platform_spec" in stored else stored["pipeline_spec"]

    def _create_experiment(self, body: Json) -> Json:
        """server/experiment_server.go: createExperiment; the name is unique: storage/experiment_store.go."""
        namespace = body.get("namespace", "") if self.multi_user else ""
        self._authorize(namespace, "create an experiment")
        _check_length("experiments", body["display_name"])
        key = {"namespace": namespace, "display_name": body["display_name"]}
        if any(key.items() <= one.items() for one in self.experiments):
            raise refuse(6, f"Already exist error: Experiment {body['display_name']} already exists")
        about = {"description": body.get("description", "")}
        self.experiments.append({**key, **about, "experiment_id": self.new_id("experiment")})
        return self.experiments[-1]

    def _create_run(self, body: Json) -> Json:
        """server/run_server.go: createRun; resource/resource_manager.go: CreateRun."""
        _check_fields(body, RUN_FIELDS)
        if not body.get("display_name"):
            raise refuse(3, "The run name is empty. Please specify a valid name")
        experiment = self._find_experiment(body.get("experiment_id", ""))
        self._authorize(experiment["namespace"], "create a run")
        spec = self._find_spec(body)
        _check_arguments(spec, body)
        made = {
            "run_id": self.new_id("run"),
            "namespace": experiment["namespace"],
            "state": "PENDING",
            "state_history": [{"state": "PENDING", "update_time": "2026-01-01T00:00:00Z"}],
            "created_at": f"2026-01-01T00:00:{self._made:02d}Z",
            "service_account": body.get("service_account") or self._default_account(),
        }
        self.runs.append({**body, **made})
        return self._show_run(self.runs[-1])

    def _find_spec(self, body: Json) -> Json:
        reference = body.get("pipeline_version_reference")
        if reference:
            self._find_pipeline(reference["pipeline_id"])
            wanted = reference["pipeline_version_id"]
            spec: Json = _find(self.versions, "pipeline_version_id", wanted, "PipelineVersion")["pipeline_spec"]
            return spec
        given = body.get("pipeline_spec")
        if not given:
            raise refuse(3, "Failed to fetch a template with an empty pipeline spec manifest")
        documents = [given["pipeline_spec"], given["platform_spec"]] if "pipeline_spec" in given else [given]
        try:
            return read_document(self.release, documents)
        except (ParseError, ValueError) as error:
            raise refuse(3, f"Invalid input error: invalid v2 pipeline spec: {error}") from None

    def _default_account(self) -> str:
        """template/template.go: setDefaultServiceAccount. In profiles, Kubeflow's manifests set default-editor."""
        return "default-editor" if self.multi_user else "pipeline-runner"

    def _terminate_run(self, run_id: str, verb: str) -> Json:
        """storage/run_store.go: TerminateRun: CANCELING, until the workflow has ended (as FAILED, seen)."""
        run = self._find_run(run_id)
        if verb != "terminate" or run["state"] not in ("PENDING", "RUNNING"):
            raise refuse(13, f"Failed to {verb} run {run_id}")
        run["state"] = "CANCELING"
        run["state_history"].append({"state": "CANCELING", "update_time": "2026-01-01T00:01:00Z"})
        return {}

    def _create_recurring_run(self, body: Json) -> Json:
        """server/api_converter.go: toModelJob; server/job_server.go: createJob; resource_manager.go: CreateJob."""
        _check_fields(body, RECURRING_FIELDS)
        if not body.get("display_name"):
            raise refuse(13, "Recurring run's name cannot be empty")
        if not 1 <= int(body.get("max_concurrency", 0)) <= 10:
            raise refuse(3, "Max concurrency of a recurring run must be at least 1 and at most 10.")
        _check_trigger(body.get("trigger", {}))
        experiment = self._find_experiment(body.get("experiment_id", ""))
        self._authorize(experiment["namespace"], "create a recurring run")
        _check_arguments(self._find_spec(body), body)
        enabled = body.get("mode") == "ENABLE"
        made = {
            "recurring_run_id": self.new_id("recurring"),
            "mode": "ENABLE" if enabled else "DISABLE",
            "status": "ENABLED" if enabled else "DISABLED",
            "max_concurrency": str(body["max_concurrency"]),
            "namespace": experiment["namespace"] or "kubeflow",  # that of the server's own pod
            "service_account": body.get("service_account") or self._default_account(),
            "created_at": f"2026-01-01T00:00:{self._made:02d}Z",
            "updated_at": f"2026-01-01T00:00:{self._made:02d}Z",
        }
        self.recurring.append({**body, **made})
        return self.recurring[-1]

    def _change_mode(self, recurring_id: str, verb: str) -> Json:
        """resource/resource_manager.go: ChangeJobMode."""
        found = self._find_recurring(recurring_id)
        found["mode"], found["status"] = verb.upper(), f"{verb.upper()}D"
        return {}

    def tick(self, now: int) -> list[str]:
        """Start the runs that are due at `now` (seconds after a recurring run was created); return their names.

        src/crd/controller/scheduledworkflow: util/scheduled_workflow.go (GetNextScheduledEpoch, NextResourceName),
        util/periodic_schedule.go (GetNextScheduledEpochNoCatchup), controller.go (syncHandler), for intervals.
        """
        started = []
        for one in self.recurring:
            runs = [run for run in self.runs if run.get("recurring_run_id") == one["recurring_run_id"]]
            interval = int(one["trigger"]["periodic_schedule"]["interval_second"])
            due = one.get("last", 0) + interval
            if one.get("no_catchup") and now >= due + interval:
                due = now
            active = [run for run in runs if run["state"] in ("PENDING", "RUNNING", "CANCELING")]
            if one["mode"] != "ENABLE" or len(active) >= int(one["max_concurrency"]) or due > now:
                continue
            one["last"] = due
            name = name_next_run(name_scheduled_workflow(one["display_name"]), len(runs) + 1)
            self._start_scheduled_run(one, name)
            started.append(name)
        return started

    def _start_scheduled_run(self, one: Json, name: str) -> None:
        source = {"pipeline_version_reference": one["pipeline_version_reference"]}
        made = {"run_id": self.new_id("run"), "recurring_run_id": one["recurring_run_id"], "state": "RUNNING"}
        fields = {field: one[field] for field in ("experiment_id", "namespace", "service_account")}
        self.runs.append({"display_name": name, **fields, **source, **made, "state_history": []})

    def replay_run(self, run_id: str, recording: Json) -> None:
        """Let a run have the state, the times and the tasks of a recorded one."""
        run = _find(self.runs, "run_id", run_id, "Run")
        for name in ("state", "state_history", "created_at", "finished_at", "run_details"):
            run[name] = recording[name]


def name_scheduled_workflow(display_name: str) -> str:
    """template/template.go: toSWFCRDResourceGeneratedName; Kubernetes then appends five random characters."""
    kept = re.sub("[^a-z0-9-]+", "", display_name.lower()) or "job-"
    return f"{kept[:25]}q9q94"


def name_next_run(scheduled_workflow: str, index: int) -> str:
    """src/crd/controller/scheduledworkflow/util/scheduled_workflow.go: NextResourceName, with FNV-1a of 32 bits."""
    name, digest = f"{scheduled_workflow}-{index}", 0x811C9DC5
    for byte in name.encode():
        digest = ((digest ^ byte) * 0x01000193) & 0xFFFFFFFF
    return f"{name}-{digest}"


def _find(things: list[Json], key: str, value: str, kind: str) -> Json:
    found = next((thing for thing in things if thing[key] == value), None)
    if found is None:  # as recorded of a run: "a run that does not exist (404)"
        raise refuse(5, f"{kind} {value} not found")
    return found


def _filter(things: list[Json], query: Query, keys: set[str]) -> list[Json]:
    """list/list.go: a filter names fields of the API; others are refused."""
    if "filter" not in query:
        return things
    (wanted,) = json.loads(query["filter"])["predicates"]
    if wanted["key"] not in keys or wanted["operation"] not in ("EQUALS", 1):
        raise refuse(3, f"no support for filtering on unrecognized field {wanted['key']!r}")
    return [thing for thing in things if thing[wanted["key"]] == wanted["stringValue"]]


def _page(name: str, things: list[Json], query: Query) -> Json:
    """list/list.go: pages of 20 unless the request wants others, of at most 200."""
    size = min(int(query.get("page_size") or PAGE_SIZE), MAX_PAGE_SIZE)
    begin = int(query.get("page_token") or 0)
    more = {"next_page_token": str(begin + size)} if begin + size < len(things) else {}
    return {name: things[begin : begin + size], "total_size": len(things), **more}


def _check_length(kind: str, name: str) -> None:
    if len(name) > NAME_CHARS[kind]:
        raise refuse(3, f"Name length cannot exceed {NAME_CHARS[kind]}")


def _check_fields(body: Json, fields: set[str]) -> None:
    unknown = set(body) - fields
    if unknown:  # grpc-gateway: protojson of the request is strict
        raise refuse(3, f"proto: unknown field {sorted(unknown)[0]!r}")


def _check_trigger(trigger: Json) -> None:
    """server/api_converter.go: toModelJob, and github.com/robfig/cron's Parse, which takes five or six fields."""
    cron = trigger.get("cron_schedule", {}).get("cron")
    if cron is not None and len(cron.split()) not in (5, 6):
        raise refuse(3, "Schedule cron is not a supported format(https://godoc.org/github.com/robfig/cron).")
    interval = trigger.get("periodic_schedule", {}).get("interval_second")
    if interval is not None and int(interval) < 1:
        raise refuse(3, f"Found invalid period schedule interval {interval}. Set at interval to least 1 second")


def _check_arguments(spec: Json, body: Json) -> None:
    """template/v2_template.go: validatePipelineJobInputs. Arguments that the pipeline does not have are ignored."""
    pipeline = spec.get("pipeline_spec", spec)
    inputs = pipeline.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    arguments = (body.get("runtime_config") or {}).get("parameters") or {}
    for name, one in inputs.items():
        if name not in arguments:
            if not one.get("isOptional") and "defaultValue" not in one:
                raise refuse(
                    3, f"parameter {name} is not optional, yet has neither default value nor user provided value"
                )
        elif not isinstance(arguments[name], PARAMETER_KINDS[one["parameterType"]]):
            raise refuse(3, f"input parameter {name} requires type {one['parameterType'].lower()}")


class _Handler(BaseHTTPRequestHandler):
    stub: PipelinesStub

    def _answer(self) -> None:
        parsed = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(parsed.query).items()}
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        stub = self.stub
        if stub.redirect:
            self.send_response(302)
            self.send_header("Location", stub.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if stub.token and self.headers.get("Authorization") != f"Bearer {stub.token}":
            self._send(401, RECORDED["no identity, multi-user (401)"])
            return
        if stub.refusal is not None and not parsed.path.endswith("/healthz"):
            self._send_text(*stub.refusal)
            return
        if self.command != "GET" and not self._begin_change(parsed.path):
            return
        try:
            self._route(parsed.path, query, raw)
        except Refused as refused:
            self._send(refused.status, refused.body)

    def _begin_change(self, path: str) -> bool:
        stub = self.stub
        change = f"{self.command} {path.removeprefix('/apis/v2beta1')}"
        if stub.break_before and len(stub.changes) + 1 >= stub.break_before:  # the client tries some things again
            self.connection.close()
            return False
        stub.before_change(change)
        stub.changes.append(change)
        return True

    def _route(self, path: str, query: Query, raw: bytes) -> None:
        stub = self.stub
        if path == "/k8s/pod/logs" and stub.behind_gateway:
            found = stub.logs.get(query["podname"])
            self._send_text(200 if found else 500, found or "Could not get main container logs")
            return
        if path.startswith("/apis/v1alpha1/runs/") and path.endswith("/log") and not stub.behind_gateway:
            _, _, _, _, run_id, _, node, _ = path.split("/")
            self._send_text(200, stub.log(unquote(run_id), unquote(node)))
            return
        if not path.startswith("/apis/v2beta1/"):
            raise Refused(404, {"error": f"nothing at {path}"})
        path = path.removeprefix("/apis/v2beta1")
        if self.command == "GET":
            self._send(200, stub.get(path, query))
        elif self.command == "DELETE":
            self._send(200, stub.delete(path))
        else:
            self._send(200, stub.post(path, query, raw if "/upload" in path else json.loads(raw or b"{}")))

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
def serving(stub: PipelinesStub, tls: Path | None = None) -> Iterator[PipelinesStub]:
    """The stub on a free port of 127.0.0.1. tls: a certificate with its key, for https."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    stub.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
