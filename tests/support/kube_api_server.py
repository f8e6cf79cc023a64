"""A small stateful Kubernetes API server with a KServe controller behind it, for the real kubernetes client.

Objects have resourceVersion and generation as in Kubernetes; a write with an old resourceVersion gets 409. A `Script`
for each digest controls what happens to a checkpoint. Services are reached through the API server's proxy.

What KServe does, read in kserve/kserve@aaac4e2 and, where it says so, seen on a cluster (Kubernetes 1.34.4):

- `canaryStatuses[]` has name, ready (one pod is available) and trafficPercent, never a modelStatus
  (reconcileCanaryDeployments in pkg/controller/v1beta1/inferenceservice/components/predictor.go);
- the stable predictor has minReplicas minus those of ready canaries, at least 1 (adjustStableMinReplicasForCanaries,
  same file);
- the webhook refuses canaries with wrong names, shares or autoscaling, with more replicas than the stable predictor,
  and outside of Standard mode; a new predictor name with the old storageUri; a name of the model in the stable
  predictor; a change of the deployment mode; a STORAGE_URI in the transformer's container (validateCanarySpecs,
  validatePredictorNameChange, validatePredictor, validateDeploymentMode and validateCollocationStorageURI in
  pkg/apis/serving/v1beta1/inference_service_validation.go);
- CanaryPredictorReady has a reason and no message, and is no part of Ready (reconcileCanaryDeployments, and
  conditionSet in pkg/apis/serving/v1beta1/inference_service_status.go);
- a canary is merged over the stable predictor, so it inherits what its own spec does not have (buildCanaryPredictor in
  components/predictor.go);
- the template of the pods has the annotations and labels of the InferenceService, except annotations of
  ServiceAnnotationDisallowedList (pkg/constants/constants.go), so that a change of one replaces the pods, or makes a
  revision in Knative mode (buildPredictorResources in components/predictor.go, createRawDefaultDeployment in
  reconcilers/deployment/deployment_reconciler.go, createKnativeService in reconcilers/knative/ksvc_reconciler.go);
- `modelStatus` is the stable predictor's, and BlockedByFailedLoad if a container of its first pod ended with an error
  (PropagateModelStatus in pkg/apis/serving/v1beta1/inference_service_status.go);
- PredictorReady has reason and message of the Deployment's condition (PropagateRawStatus, same file; seen: FailedCreate
  with the message of Pod Security);
- pods have the arguments of the ServingRuntime followed by those of the InferenceService (MergeRuntimeContainers in
  pkg/controller/v1beta1/inferenceservice/utils/utils.go; seen);
- Knative refuses a pod whose containers have more than one port, or probes on one without a port
  (pkg/apis/serving/k8s_validation.go of knative/serving@98e5ef9); KServe then says ReconcileFailed.
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
from urllib.parse import unquote

from kubernetes import client

from clincot.clients.kubernetes import Cluster

Json = dict[str, Any]
PROXY = re.compile(r"/api/v1/namespaces/[^/]+/services/http:([^:]+):80/proxy(/.*)")


# annotations of an InferenceService that its pods do not get, and fields of a predictor that are not its pods'
UNCOPIED_ANNOTATIONS = {
    "autoscaling.knative.dev/min-scale",
    "autoscaling.knative.dev/max-scale",
    "internal.serving.kserve.io/storage-initializer-sourceuri",
    "kubectl.kubernetes.io/last-applied-configuration",
    "modelFormat",
}
SCALING_FIELDS = {
    "name",
    "minReplicas",
    "maxReplicas",
    "scaleTarget",
    "scaleMetric",
    "autoScaling",
    "canaryTrafficPercent",
}
RUNTIME_ARGS = ["serve"]  # of the chart's ServingRuntime clincot-serve
PODS = re.compile(r"/api/v1/namespaces/([^/]+)/(pods|events)")
POD_PROXY = re.compile(r"/api/v1/namespaces/[^/]+/pods/http:([^:]+):8080/proxy(/.*)")
POD_LOG = re.compile(r"/api/v1/namespaces/[^/]+/pods/([^/]+)/log")
RESTRICTED = (
    'Error creating: pods "{pod}-5cbhz" is forbidden: violates PodSecurity "restricted:latest": '
    'allowPrivilegeEscalation != false (container "storage-initializer" must set '
    "securityContext.allowPrivilegeEscalation=false)"
)  # seen, shortened


@dataclass
class Script:
    """The fate of a checkpoint: ready at the `ready_after`-th read (0: never), not ready `gone_after` reads later."""

    ready_after: int = 1
    gone_after: int = 0
    failure: str = ""  # the model cannot be loaded: its container has ended four times with this message
    create_error: str = ""  # the ReplicaSet's event FailedCreate, with {pod} in it; no pod exists
    pod_status: Json | None = None  # of every pod, in place of one that comes up
    log: str = ""  # of a container that ended
    available: int = 99  # pods for which the cluster has room
    chat: Callable[[Json], tuple[int, Json]] | None = None
    metrics: Callable[[str], str] | None = None  # by the pod's name
    looks: int = 0
    ready: bool = False

    def look(self) -> bool:
        self.looks += 1
        ready = 0 < self.ready_after <= self.looks
        healthy = not (self.failure or self.create_error or self.pod_status)
        self.ready = healthy and ready and not (self.gone_after and self.looks >= self.ready_after + self.gone_after)
        return self.ready


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
    scales: list[dict[str, int]] = field(default_factory=list)  # replicas of every Deployment, whenever they change
    replaced: list[str] = field(default_factory=list)  # Deployments whose pods were replaced by others
    url: str = ""
    _templates: dict[str, dict[str, str]] = field(default_factory=dict)  # of pods, by service and Deployment
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _version: int = 0
    _attempts: int = 0
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
            if proxied := POD_PROXY.fullmatch(path):
                return self.read_pod(proxied[1], proxied[2])
            if logged := POD_LOG.fullmatch(path):
                script = self._script_of_pod(logged[1])
                return (200, script.log) if "previous=true" in query else (400, {"message": "no such container"})
            if listed := PODS.fullmatch(path):
                items = self._list_pods(listed[1], query) if listed[2] == "pods" else self._list_events(listed[1])
                return 200, {"items": items}
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
            return self._admit(path, body or {}, 201)
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
        return self._admit(path, body, 200)

    def _admit(self, path: str, body: Json, status: int) -> tuple[int, Json]:
        """KServe's validating webhook."""
        wrong = ""
        if body.get("kind") == "InferenceService":
            before = self.objects.get(path)
            wrong = find_mode_change(before, body) or find_invalid_rename(before, body)
            wrong = wrong or find_invalid_predictor(body) or find_invalid_canary(body)
        if wrong:
            webhook = "inferenceservice.kserve-webhook-server.validator"
            return 403, {"message": f'admission webhook "{webhook}" denied the request: {wrong}'}
        return status, self._write(path, body)

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
        status["canaryStatuses"] = [self._canary(one) for one in spec.get("canary", ())]
        ready, condition, status["modelStatus"] = self._state(thing)
        status["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}, condition]
        if status["canaryStatuses"]:
            all_ready = all(one["ready"] for one in status["canaryStatuses"])
            reason = "AllCanariesReady" if all_ready else "CanariesNotReady"
            canaries = {"type": "CanaryPredictorReady", "status": "True" if all_ready else "False", "reason": reason}
            status["conditions"].append(canaries)
        status["deploymentMode"] = thing["metadata"]["annotations"]["serving.kserve.io/deploymentMode"]
        uri = spec["predictor"]["model"]["storageUri"]
        changed = self._note_templates(thing)
        if status["deploymentMode"] != "Knative":
            self.replaced += changed
        if self._revisions[-1:] != [uri] or (changed and status["deploymentMode"] == "Knative"):
            self._revisions.append(uri)
        name = f"{thing['metadata']['name']}-{len(self._revisions):05d}"
        part = status.setdefault("components", {}).setdefault("predictor", {})
        part["latestCreatedRevision"] = name
        if ready:
            part["latestReadyRevision"] = name
            self._roll_out(part, name, spec["predictor"].get("canaryTrafficPercent", 100))
        part["traffic"] = [{"latestRevision": True, "tag": "latest", "url": f"{self.url}/knative/{uri[-64:]}"}]
        status["url"] = f"{self.url}/knative/{uri[-64:]}"
        scale = {name: replicas for name, replicas, _ in self._list_deployments(thing)}
        if self.scales[-1:] != [scale]:
            self.scales.append(scale)

    def _note_templates(self, thing: Json) -> list[str]:
        """Return the Deployments whose pods have another template than at the last look."""
        metadata = thing["metadata"]
        copied = {key: text for key, text in metadata["annotations"].items() if key not in UNCOPIED_ANNOTATIONS}
        templates = {}
        for name, _, predictor in self._list_deployments(thing):
            pod = {key: value for key, value in predictor.items() if key not in SCALING_FIELDS}
            templates[name] = json.dumps([copied, metadata.get("labels", {}), pod], sort_keys=True)
        before = self._templates.get(metadata["name"], {})
        self._templates[metadata["name"]] = templates
        return [name for name, template in templates.items() if before.get(name, template) != template]

    def _roll_out(self, part: Json, ready: str, percent: int) -> None:
        """PropagateStatus in pkg/apis/serving/v1beta1/inference_service_status.go.

        A revision with all traffic is the rolled-out one. If it loses traffic again, the one before is.
        """
        if percent == 100 and part.get("latestRolledoutRevision") != ready:
            part["previousRolledoutRevision"] = part.get("latestRolledoutRevision", "")
            part["latestRolledoutRevision"] = ready
        elif percent < 100 and part.get("latestRolledoutRevision") == ready and part.get("previousRolledoutRevision"):
            part["latestRolledoutRevision"] = part["previousRolledoutRevision"]

    def _state(self, thing: Json) -> tuple[bool, Json, Json]:
        """(ready, condition PredictorReady, modelStatus) of the stable predictor."""
        predictor = thing["spec"]["predictor"]
        script = self.script(predictor["model"]["storageUri"])
        condition = {"type": "PredictorReady", "status": "False"}
        if thing["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Knative":
            wrong = find_knative_refusal(predictor)
            if wrong:
                return False, condition | {"reason": "ReconcileFailed", "message": wrong}, {}
        if script.failure:
            info = {"message": script.failure, "reason": "ModelLoadFailed", "exitCode": 1}
            return False, condition, {"transitionStatus": "BlockedByFailedLoad", "lastFailureInfo": info}
        if script.create_error:
            message = script.create_error.format(pod=self._deployment_name(thing, predictor)).removeprefix(
                "Error creating: "
            )
            return False, condition | {"reason": "FailedCreate", "message": message}, {"transitionStatus": "InProgress"}
        ready = script.look()
        return ready, condition | {"status": "True" if ready else "False"}, {"transitionStatus": "UpToDate"}

    def _canary(self, entry: Json) -> Json:
        ready = self.script(entry["predictor"]["model"]["storageUri"]).look()
        return {"name": entry["predictor"]["name"], "ready": ready, "trafficPercent": entry["trafficPercent"]}

    def _deployment_name(self, thing: Json, predictor: Json) -> str:
        """constants.PredictorServiceName in pkg/constants/constants.go."""
        return "-".join(filter(None, (thing["metadata"]["name"], predictor.get("name", ""), "predictor")))

    def _list_deployments(self, thing: Json) -> list[tuple[str, int, Json]]:
        """(name, replicas, predictor) of the stable predictor and of each canary."""
        spec, statuses = thing["spec"], thing["status"].get("canaryStatuses", ())
        ready = {status["name"] for status in statuses if status["ready"]}
        canaries = []
        for one in spec.get("canary", ()):
            merged = merge_over(spec["predictor"], one["predictor"])
            canaries.append((merged, one["predictor"]["minReplicas"]))
        taken = sum(replicas for predictor, replicas in canaries if predictor["name"] in ready)
        stable = spec["predictor"].get("minReplicas", 1)
        stable = max(stable - taken, 1) if taken else stable
        pairs = [(spec["predictor"], stable), *canaries]
        return [(self._deployment_name(thing, predictor), replicas, predictor) for predictor, replicas in pairs]

    def _iter_services(self, namespace: str) -> Iterator[Json]:
        for path, thing in list(self.objects.items()):
            if f"/namespaces/{namespace}/inferenceservices/" in path:
                yield thing

    def _list_pods(self, namespace: str, query: str) -> list[Json]:
        """The pods with the labels of the query."""
        selected = unquote(query).partition("labelSelector=")[2].partition("&")[0]
        pods = []
        for thing in self._iter_services(namespace):
            revision = thing["status"].get("components", {}).get("predictor", {}).get("latestCreatedRevision", "")
            for name, replicas, predictor in self._list_deployments(thing):
                if selected not in (f"app=isvc.{name}", f"serving.knative.dev/revision={revision}"):
                    continue
                script = self.script(predictor["model"]["storageUri"])
                count = 0 if script.create_error else replicas
                pods += [self._build_pod(name, number, predictor, script) for number in range(count)]
        return pods

    def _build_pod(self, deployment: str, number: int, predictor: Json, script: Script) -> Json:
        ready = script.ready and number < script.available
        status: Json = {"phase": "Running", "podIP": f"10.0.0.{number}"}
        status["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}]
        if script.failure:
            ended = {"exitCode": 1, "reason": "Error", "message": script.failure}
            status["containerStatuses"] = [
                {"name": "kserve-container", "restartCount": 4, "state": {}, "lastState": {"terminated": ended}}
            ]
        elif number >= script.available:
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
            status["conditions"].append(condition | {"message": "0/3 nodes are available: 3 Insufficient cpu."})
        model = predictor["model"]
        containers = [{"name": "kserve-container", "args": [*RUNTIME_ARGS, *model.get("args", ())]}]
        return {
            "metadata": {"name": f"{deployment}-68786ff45-{number}"},
            "spec": {"containers": [*containers, *predictor.get("containers", ())]},
            "status": status | (script.pod_status or {}),
        }

    def _list_events(self, namespace: str) -> list[Json]:
        events = []
        for thing in self._iter_services(namespace):
            for name, _, predictor in self._list_deployments(thing):
                error = self.script(predictor["model"]["storageUri"]).create_error
                owner = f"{name}-68786ff45"
                if error:
                    involved = {"kind": "ReplicaSet", "name": owner}
                    message = error.format(pod=owner)
                    event = {"reason": "FailedCreate", "involvedObject": involved, "message": message}
                    self._attempts += 1  # the ReplicaSet tries again, which counts its event up
                    events.append(event | {"metadata": {"uid": owner}, "count": self._attempts})
        return events

    def _script_of_pod(self, pod: str) -> Script:
        """Pods of a canary or of a blue-green service are named after the checkpoint; Knative's are of the last one."""
        named = next((digest for digest in self.scripts if f"r{digest[:10]}" in pod), "")
        return self.scripts[named or self._revisions[-1][-64:]]

    def read_pod(self, pod: str, path: str) -> tuple[int, Json | str]:
        """A request to one pod."""
        script = self._script_of_pod(pod)
        found = path == "/metrics" and script.metrics is not None
        return (200, script.metrics(pod)) if found and script.metrics else (404, {"message": "no metrics"})

    def script(self, uri: str) -> Script:
        return self.scripts.setdefault(uri[-64:], Script())

    def reached(self, service: str, path: str, body: Json) -> tuple[int, Json | str]:
        with self._lock:
            return self._proxy(service, path, body)

    def _proxy(self, service: str, path: str, body: Json) -> tuple[int, Json | str]:
        fronts = [one for at, one in self.objects.items() if at.endswith(f"/services/{service}")]
        selected = fronts[0]["spec"]["selector"]["app"] if fronts else service
        digest = next((d for d in self.scripts if f"r{d[:10]}" in selected), "")
        return self.answer(digest, path, body) if digest else (503, {"message": f"no endpoints for {service}"})

    def answer(self, digest: str, path: str, body: Json) -> tuple[int, Json | str]:
        script = self.scripts[digest]
        return script.chat(body) if script.chat else (500, {"error": "down"})


def find_invalid_canary(service: Json) -> str:
    """validateCanarySpecs of KServe."""
    stable, canaries = service["spec"]["predictor"], service["spec"].get("canary") or ()
    mode = service["metadata"].get("annotations", {}).get("serving.kserve.io/deploymentMode")
    if canaries and mode != "Standard":
        return "canary is only supported in Standard deployment mode"
    names = [canary["predictor"].get("name", "") for canary in canaries]
    for number, canary in enumerate(canaries):
        name, replicas = names[number], canary["predictor"].get("minReplicas")
        if not name:
            return f"canary[{number}] predictor.name is required"
        if names.count(name) > 1:
            return f'canary predictor.name "{name}" is duplicated'
        if name == stable.get("name"):
            return f'canary predictor.name "{name}" conflicts with stable predictor name'
        if not 0 <= canary["trafficPercent"] <= 100:
            return f'canary "{name}" trafficPercent must be between 0 and 100, got {canary["trafficPercent"]}'
        if "workerSpec" in canary["predictor"]:
            return f'canary "{name}" must not set workerSpec (multi-node is not yet supported for canary)'
        for field_name in ("maxReplicas", "scaleTarget", "scaleMetric", "autoScaling"):
            if canary["predictor"].get(field_name):
                return f'canary "{name}" must not set {field_name} (canary uses fixed replicas)'
        if replicas is not None and replicas > stable.get("minReplicas", 1):
            return (
                f'canary "{name}" minReplicas ({replicas}) must not exceed stable predictor minReplicas '
                f"({stable.get('minReplicas', 1)})"
            )
    total = sum(canary["trafficPercent"] for canary in canaries)
    return f"sum of canary trafficPercent values ({total}) must be <= 100" if total > 100 else ""


def merge_over(stable: Json, canary: Json) -> Json:
    """buildCanaryPredictor of KServe: mergo.Merge with override, which merges maps and replaces lists; nothing empty

    of the canary replaces a value.
    """
    merged = copy.deepcopy(stable)
    for key, value in canary.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge_over(merged[key], value)
        elif value or value == 0:
            merged[key] = copy.deepcopy(value)
    return merged


def find_mode_change(before: Json | None, after: Json) -> str:
    """validateDeploymentMode of KServe, with the names of ParseDeploymentMode (pkg/constants/constants.go)."""
    mode = {"RawDeployment": "Standard", "Serverless": "Knative"}
    old = (before or {}).get("status", {}).get("deploymentMode", "")
    new = after["metadata"].get("annotations", {}).get("serving.kserve.io/deploymentMode", old)
    if old in ("", new) or mode.get(old, old) == new:
        return ""
    return f"update rejected: deploymentMode cannot be changed from '{mode.get(old, old)}' to '{new}'"


def find_invalid_predictor(service: Json) -> str:
    """validateCollocationStorageURI and validatePredictor of KServe."""
    predictor = service["spec"]["predictor"]
    for container in predictor.get("containers") or ():
        names = [one["name"] for one in container.get("env") or ()]
        if container["name"] == "transformer-container" and "STORAGE_URI" in names:
            return "storage uri should not be specified in transformer container"
    return "the 'name' field is not allowed in standard predictor" if predictor["model"].get("name") else ""


def find_invalid_rename(before: Json | None, after: Json) -> str:
    """validatePredictorNameChange of KServe."""
    if before is None:
        return ""
    old, new = before["spec"]["predictor"], after["spec"]["predictor"]
    same = old["model"]["storageUri"] == new["model"]["storageUri"]
    renamed = old.get("name", "") != new.get("name", "")
    return "predictor.name change requires a model change (e.g. storageUri)" if renamed and same else ""


def find_knative_refusal(predictor: Json) -> str:
    """validateContainersPorts and validateSidecarContainer of Knative, with the ServingRuntime's port of the model."""
    containers = predictor.get("containers") or ()
    if any(container.get("ports") for container in containers):
        return "more than one container port is set: spec.template.spec.containers.ports"
    return "must not set the field(s): containers[1].readinessProbe" if containers else ""


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
            elif path.startswith("/pods/"):  # a pod by its own address
                _, _, pod, rest = path.split("/", 3)
                status, reply = server.read_pod(pod, f"/{rest}")
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
