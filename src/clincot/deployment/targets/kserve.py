"""Rollouts on KServe (0.20 and later).

They use spec.canary[], or canaryTrafficPercent in Knative mode. Each update reads the object, changes only our fields,
and writes it back if it has not changed since. deployment/targets/select.py chooses the class.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator

from clincot.clients import kubernetes
from clincot.clients.kubernetes import Cluster, ClusterFailed, Forbidden, ObjectNotFound
from clincot.clients.pod_problems import count_ready_pods, find_pod_problems, list_creation_events, list_pods
from clincot.deployment import crd, release_ownership
from clincot.deployment.inference_service import (
    CRD_NAME,
    CREATOR_ANNOTATION,
    GROUP,
    MODE_ANNOTATION,
    PLURAL,
    RELEASE_LABEL,
    TAG_ROUTING_ANNOTATION,
    VERSION,
    Json,
    build_canary,
    build_inference_service,
    build_predictor,
    build_revision_name,
    count_canary_replicas,
)
from clincot.deployment.rollout import CountedRequests, NotReady, RequestCounts, TargetFailed, parse_request_counts
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.smoke import RequestFailed, get_text, post_json

_METRICS_TIMEOUT_S = 5.0
_METRICS_PORT = 8080
_MAX_REASONS = 3
# of a predictor, which a canary never inherits, or which a rollout sets
_OWN_FIELDS = {"name", "minReplicas", "maxReplicas", "scaleTarget", "scaleMetric", "autoScaling"}
_LEGACY_MODES = {"RawDeployment": "Standard", "Serverless": "Knative"}  # names of older versions of KServe
_FAILED_TRANSITIONS = {"BlockedByFailedLoad", "InvalidSpec"}


class KServeTarget(ABC):
    """The common part of the three KServe targets.

    An instance performs one rollout of one checkpoint.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: ServiceSettings,
        digest: str,
        uri: str,
        steps: tuple[int, ...],
        *,
        validator: Draft202012Validator | None = None,
        how: str = "as asked for",
    ) -> None:
        self.how = how
        self.cluster, self.settings, self.digest, self.uri = cluster, settings, digest, uri
        self.revision = build_revision_name(digest)
        self._steps, self._validator = steps, validator
        self._ready = False
        self._old_events: frozenset[str] = frozenset()  # of an earlier attempt, before this one wrote anything
        self._reasons = ""  # why the revision is not ready, as Kubernetes said it at the last look
        self._alone = False  # True if no other revision shares the traffic

    @property
    def steps(self) -> tuple[int, ...]:
        return (100,) if self._alone else self._steps

    @property
    def model(self) -> str:
        return self.settings.name

    def build_path(self, name: str = "") -> str:
        """The API path of an InferenceService; default: the one named like the service."""
        return kubernetes.resource_path(GROUP, VERSION, self.settings.namespace, PLURAL, name or self.settings.name)

    @abstractmethod
    def build_manifest(self) -> Json:
        """Build the manifest that is applied if the object does not exist."""

    def start_revision(self, rollout: str) -> str:
        with kserve_errors():
            changed = release_ownership.update_references(self.cluster, self.settings)
        return "; ".join(filter(None, (changed, self._add_revision(rollout))))

    @abstractmethod
    def _add_revision(self, rollout: str) -> str:
        """Start the new revision beside what is served, and return a description for the journal."""

    @property
    def counts_smoke_requests(self) -> bool:
        """The servers' own metrics count every question, those of the rollout, too."""
        return True

    @property
    @abstractmethod
    def pod_selector(self) -> str:
        """Labels of the pods that answer questions; "" as long as they are unknown."""

    @property
    @abstractmethod
    def deployment_name(self) -> str:
        """Name of the Deployment behind the revision; its ReplicaSets' and pods' names begin with it."""

    @abstractmethod
    def check_ready(self) -> bool: ...

    @abstractmethod
    def post_request(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any: ...

    @abstractmethod
    def shift_traffic(self, percent: int) -> None: ...

    @abstractmethod
    def describe_traffic(self) -> str: ...

    @abstractmethod
    def post_to_endpoint(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any: ...

    @abstractmethod
    def finish_rollout(self) -> None: ...

    def remove_former_services(self) -> str:
        return release_ownership.remove_former_services(self.cluster, self.settings)

    @abstractmethod
    def roll_back(self, rollout: str) -> None: ...

    def check_owner(self) -> None:
        """Raise TargetFailed if the service belongs to another Helm release."""
        release = self.settings.release
        with kserve_errors():
            now = self._read_serving_object()
        owner = "" if now is None else now["metadata"].get("labels", {}).get(RELEASE_LABEL, "")
        if release is not None and owner and owner != release.name:
            raise TargetFailed(
                f"{self.settings.name} in {self.settings.namespace} is served by the release {owner}, not by "
                f"{release.name}; give one of them another name (server.name)"
            )

    def _read_serving_object(self) -> Json | None:
        """The object by whose name clients call the service; None if there is none yet."""
        return self._read_inference_service()

    def validate_manifest(self) -> None:
        """Validate the manifest against the CRD.

        Raises crd.InvalidResource, TargetFailed.
        """
        if self._validator is None:
            with kserve_errors():
                definition = self.cluster.get(kubernetes.crd_path(CRD_NAME))
            self._validator = crd.build_validator(definition, VERSION)
        self._validate_object(self.build_manifest())

    def _validate_object(self, manifest: Json) -> None:
        if self._validator is None:
            raise AssertionError("call validate_manifest() first, which sets the validator")
        crd.validate_manifest(manifest, self._validator)

    def scale_revision(self, percent: int) -> None:
        """Does nothing here: the revision has all its replicas from the start."""
        return

    def explain_waiting(self) -> str:
        return self._reasons

    def read_request_counts(self) -> CountedRequests:
        """Read the metrics of every pod of the revision.

        A Service would return those of an arbitrary pod, so they are read pod by pod.
        """
        selector = self.pod_selector
        if not selector:
            return CountedRequests({}, "the revision's pods are not known")
        try:
            pods = list_pods(self.cluster, self.settings.namespace, selector)
        except ClusterFailed as error:
            return CountedRequests({}, f"its pods cannot be listed ({error})")
        counted: dict[str, RequestCounts] = {}
        missing = "" if pods else "it has no pods"
        for pod in pods:
            name = pod["metadata"]["name"]
            try:
                counts = parse_request_counts(self._read_pod_metrics(pod))
            except (ClusterFailed, RequestFailed, ValueError) as error:
                missing = f"the metrics of {name} cannot be read ({error})"
                continue
            counted[name] = counts or RequestCounts(0, 0)  # a server counts from its first question on
        return CountedRequests(counted, missing)

    def _read_pod_metrics(self, pod: Json) -> str:
        name, namespace = pod["metadata"]["name"], self.settings.namespace
        url = self.settings.pod_metrics_url
        if not url and not self.settings.service_url:
            path = kubernetes.pod_proxy_path(namespace, name, "/metrics", _METRICS_PORT)
            return self.cluster.request_text("GET", path, timeout_s=_METRICS_TIMEOUT_S)
        url = url or f"http://{{pod_ip}}:{_METRICS_PORT}/metrics"
        address = pod.get("status", {}).get("podIP", "")
        address = f"[{address}]" if ":" in address else address  # IPv6
        return get_text(url.format(pod_ip=address, pod=name, namespace=namespace), "", _METRICS_TIMEOUT_S)

    def _look_at_pods(self) -> None:
        """Note why the revision's pods are not ready. Raises NotReady for a reason that waiting cannot mend."""
        selector = self.pod_selector
        if not selector:
            return
        problems = find_pod_problems(
            self.cluster, self.settings.namespace, selector, self.deployment_name, old_events=self._old_events
        )
        self._reasons = "; ".join(problem.text for problem in problems[:_MAX_REASONS])
        if problems and problems[0].permanent:
            raise NotReady(f"{self.deployment_name} cannot become ready: {problems[0].text}")

    def _note_old_events(self) -> None:
        with contextlib.suppress(Forbidden):  # then the wait tells that events cannot be read
            events = list_creation_events(self.cluster, self.settings.namespace, self.deployment_name)
            self._old_events = frozenset(events)

    def _note_conditions(self, now: Json) -> None:
        """Note what KServe says about the object, where its pods tell nothing."""
        texts = []
        for kind, condition in kubernetes.get_conditions(now).items():
            if kind != "Ready" and condition.get("status") == "False" and condition.get("message"):
                texts.append(f"{kind}: {condition.get('reason', '')}: {condition['message']}")
        self._reasons = self._reasons or "; ".join(texts[:_MAX_REASONS])

    def _build_proxy_path(self, service: str, path: str) -> str:
        return kubernetes.service_proxy_path(self.settings.namespace, service, path)

    def _build_service_url(self, service: str) -> str:
        return self.settings.service_url.format(service=service, namespace=self.settings.namespace)

    def _read_inference_service(self, name: str = "") -> Json | None:
        try:
            return self.cluster.get(self.build_path(name))
        except ObjectNotFound:
            return None

    def _create_inference_service(self, rollout: str) -> Json:
        manifest = self.build_manifest()
        manifest["metadata"]["annotations"][CREATOR_ANNOTATION] = rollout
        return self.cluster.create(self.build_path(), manifest)

    def _read_existing_service(self, name: str) -> Json:
        """Return an InferenceService that this rollout has started. Raises NotReady if it does not exist."""
        with kserve_errors():
            now = self._read_inference_service(name)
        if now is None:
            raise NotReady(f"InferenceService {name} does not exist any more")
        return now

    def _check_whole_service(self, now: Json) -> bool:
        """Whether an InferenceService without a canary is ready; if not, note why. Raises NotReady."""
        ready = is_ready(now)
        self._update_readiness(ready, now.get("status", {}).get("modelStatus", {}), now["metadata"]["name"])
        self._note_conditions(now)
        return ready

    def _update_readiness(self, ready: bool, model_status: Mapping[str, Any], what: str) -> bool:
        """Record the readiness and return it; if it is not reached yet, note why.

        Raises NotReady if it is lost, or can never be reached.
        """
        failure = model_status.get("lastFailureInfo") or {}
        if model_status.get("transitionStatus") in _FAILED_TRANSITIONS:
            raise NotReady(
                f"{what}: {model_status['transitionStatus']}: {failure.get('message') or failure.get('reason')}"
            )
        self._reasons = ""
        if not ready:
            with kserve_errors():
                self._look_at_pods()
        if self._ready and not ready:
            cause = failure.get("message") or self._reasons or "the logs of its pods may say why"
            raise NotReady(f"{what} was ready and is no longer ready; {cause}")
        self._ready = self._ready or ready
        return ready

    def _post_to_service(self, service: str, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        if self.settings.service_url:
            return post_json(self._build_service_url(service), path, payload, timeout_s)
        try:
            return self.cluster.request(
                "POST", self._build_proxy_path(service, path), dict(payload), timeout_s=timeout_s
            )
        except ClusterFailed as error:
            raise RequestFailed(str(error), error.status) from None

    def _post_to_url(self, path: str, payload: Mapping[str, Any], timeout_s: float, service: str) -> Any:
        """POST to endpoint_url, or to the Service that gets the traffic if there is none."""
        if self.settings.endpoint_url:
            return post_json(self.settings.endpoint_url, path, payload, timeout_s)
        return self._post_to_service(service, path, payload, timeout_s)


class CanaryTarget(KServeTarget):
    """A rollout with spec.canary[].

    The new revision is a second predictor, named after its checkpoint. Promotion makes it the stable predictor under
    the same name, so its pods keep running.

    KServe takes the replicas of ready canaries off the stable predictor (adjustStableMinReplicasForCanaries in
    pkg/controller/v1beta1/inferenceservice/components/predictor.go of kserve/kserve@aaac4e2). So while the canary
    exists, the stable predictor asks for its own replicas plus the canary's: it keeps all of its pods until the end,
    also for a return of the traffic. The canary has as many replicas as its share needs, and they are ready before it
    gets the share.
    """

    def build_manifest(self) -> Json:
        return build_inference_service(self.settings, self.digest, self.uri, mode="Standard")

    def validate_manifest(self) -> None:
        super().validate_manifest()
        canary = build_canary(self.settings, self.digest, self.uri, 0)
        self._validate_object(self.build_manifest() | {"spec": self.build_manifest()["spec"] | {"canary": [canary]}})

    def _add_revision(self, rollout: str) -> str:
        with kserve_errors():
            self._note_old_events()
            now = self._read_inference_service()
            if now is None:
                now = self._create_inference_service(rollout)
            check_deployment_mode(now, "Standard")
            self._alone = _read_stable_name(now) == self.revision
            if self._alone:
                unchanged = _describe_unchanged(now, rollout)
                return f"InferenceService {self.settings.name} with {self.revision} alone{unchanged}"
            self._update_canary(percent=0, replicas=1)
        ours = build_predictor(self.settings, self.digest, self.uri, mode="Standard")
        inherited = list_inherited_fields(now["spec"]["predictor"], ours)
        note = ""
        if inherited:
            note = f"; it inherits {', '.join(inherited)} from there, and gets new pods without them at the promotion"
        stable = _read_stable_name(now)
        return f"{self.revision} beside {stable} of InferenceService {self.settings.name}, as spec.canary{note}"

    def check_ready(self) -> bool:
        now = self._read_existing_service(self.settings.name)
        if self._alone:
            return self._check_whole_service(now)
        canary = self._find_canary(now)
        if canary is None:
            raise NotReady(f"InferenceService {self.settings.name} has no canary {self.revision} any more")
        # KServe sets only name, ready (one available pod) and trafficPercent of a canary's status, never modelStatus
        # (reconcileCanaryDeployments, same file), so its pods say the rest.
        statuses = now.get("status", {}).get("canaryStatuses") or ()
        ready = any(status["name"] == self.revision and status.get("ready") for status in statuses)
        self._update_readiness(ready, {}, f"canary {self.revision}")
        with kserve_errors():
            return ready and self._has_replicas(canary["predictor"]["minReplicas"])

    def _has_replicas(self, wanted: int) -> bool:
        if wanted == 1:
            return True
        pods = list_pods(self.cluster, self.settings.namespace, self.pod_selector)
        if count_ready_pods(pods) >= wanted:
            return True
        self._look_at_pods()
        self._reasons = self._reasons or f"{count_ready_pods(pods)} of {wanted} replicas are ready"
        return False

    @property
    def backend_service(self) -> str:
        return f"{self.settings.name}-{self.revision}-predictor"

    @property
    def deployment_name(self) -> str:
        return self.backend_service

    @property
    def pod_selector(self) -> str:
        return f"app=isvc.{self.backend_service}"  # constants.GetRawServiceLabel of KServe

    def post_request(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        return self._post_to_service(self.backend_service, path, payload, timeout_s)

    def post_to_endpoint(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        return self._post_to_url(path, payload, timeout_s, self.backend_service)

    def scale_revision(self, percent: int) -> None:
        if self._alone:
            return
        with kserve_errors():
            now = self._read_inference_service() or {"spec": {}}
            canary = self._find_canary(now)
            share = 0 if canary is None else canary["trafficPercent"]
            self._update_canary(percent=share, replicas=count_canary_replicas(self.settings.replicas, percent))

    def shift_traffic(self, percent: int) -> None:
        if not self._alone:
            with kserve_errors():
                self._update_canary(percent, count_canary_replicas(self.settings.replicas, percent))

    def describe_traffic(self) -> str:
        with kserve_errors():
            now = self._read_inference_service()
        if now is None:
            return f"no InferenceService {self.settings.name} exists, so nothing gets traffic"
        shares = {entry["predictor"]["name"]: entry["trafficPercent"] for entry in now["spec"].get("canary") or ()}
        stable = _read_stable_name(now)
        parts = [f"{100 - sum(shares.values())} % of the traffic goes to {self._describe_revision(stable)}"]
        parts += [f"{percent} % to {self._describe_revision(name)}" for name, percent in shares.items()]
        return ", ".join(parts)

    def _describe_revision(self, name: str) -> str:
        return f"{name} (this rollout's revision)" if name == self.revision else name

    def finish_rollout(self) -> None:
        def promote(now: Json) -> Json:
            if not self._alone:
                now["spec"]["predictor"] = build_predictor(self.settings, self.digest, self.uri, mode="Standard")
                now["spec"].pop("canary", None)
            return now

        with kserve_errors():
            self.cluster.update_with_retry(self.build_path(), promote)

    def roll_back(self, rollout: str) -> None:
        def remove_canary(now: Json) -> Json:
            canary = self._find_canary(now)
            if canary is not None:
                now["spec"]["predictor"]["minReplicas"] -= canary["predictor"]["minReplicas"]
            others = [one for one in now["spec"].pop("canary", ()) if one["predictor"]["name"] != self.revision]
            if others:
                now["spec"]["canary"] = others
            return now

        with kserve_errors():
            now = self._read_inference_service()
            if now is not None and _read_stable_name(now) != self.revision:
                self.cluster.update_with_retry(self.build_path(), remove_canary)
            elif now is not None and _is_created_by(now, rollout):
                self.cluster.delete(self.build_path())

    def _find_canary(self, now: Json) -> Json | None:
        canaries = now["spec"].get("canary") or ()
        return next((canary for canary in canaries if canary["predictor"]["name"] == self.revision), None)

    def _update_canary(self, percent: int, replicas: int) -> None:
        def update(now: Json) -> Json:
            others = [canary["predictor"]["name"] for canary in now["spec"].get("canary") or ()]
            if any(name != self.revision for name in others):
                raise TargetFailed(
                    f"InferenceService {self.settings.name} has the canary {others[0]} of another rollout"
                )
            before, stable = self._find_canary(now), now["spec"]["predictor"]
            added = 0 if before is None else before["predictor"]["minReplicas"]
            stable["minReplicas"] = stable.get("minReplicas", 1) - added + replicas
            canary = build_canary(self.settings, self.digest, self.uri, percent, replicas=replicas)
            now["spec"]["canary"] = [canary]
            return now

        self.cluster.update_with_retry(self.build_path(), update)


class KnativeTarget(KServeTarget):
    """A rollout with canaryTrafficPercent.

    KServe leaves the rest of the traffic on the revision that last had all of it.
    """

    _knative_revision = ""  # Knative's name of the new revision, once it is known

    def build_manifest(self) -> Json:
        return build_inference_service(self.settings, self.digest, self.uri, mode="Knative")

    def _add_revision(self, rollout: str) -> str:
        def add_revision(now: Json) -> Json:
            predictor = build_predictor(self.settings, self.digest, self.uri, mode="Knative")
            now["spec"]["predictor"] = predictor | {"canaryTrafficPercent": 0}
            return now

        with kserve_errors():
            now = self._read_inference_service()
            if now is None:
                now = self._create_inference_service(rollout)
            check_deployment_mode(now, "Knative")
            self._alone = _read_storage_uri(now) == self.uri and not _shares_traffic(now)
            if not self._alone:
                self.cluster.update_with_retry(self.build_path(), add_revision)
        how = _describe_unchanged(now, rollout) if self._alone else ", canaryTrafficPercent 0"
        return f"a revision of InferenceService {self.settings.name}{how}"

    def check_ready(self) -> bool:
        now = self._read_existing_service(self.settings.name)
        status = now.get("status", {})
        predictor = status.get("components", {}).get("predictor", {})
        newest = predictor.get("latestCreatedRevision", "")
        # The status lags behind: at first it still names the old revision, which has all traffic, as the newest.
        is_new = self._alone or self._ready or newest != predictor.get("latestRolledoutRevision")
        self._knative_revision = newest if is_new else ""
        ready = bool(newest and is_new and newest == predictor.get("latestReadyRevision") and is_ready(now))
        self._update_readiness(ready, status.get("modelStatus", {}) if is_new else {}, self.settings.name)
        self._note_conditions(now)
        return ready

    @property
    def deployment_name(self) -> str:
        return f"{self._knative_revision}-deployment"  # how Knative names it

    @property
    def pod_selector(self) -> str:
        revision = self._knative_revision
        return f"serving.knative.dev/revision={revision}" if revision else ""

    def post_to_endpoint(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        with kserve_errors():
            url = self.settings.endpoint_url or (self._read_inference_service() or {}).get("status", {}).get("url", "")
        if not url:
            raise RequestFailed(f"InferenceService {self.settings.name} has no address; set endpoint_url")
        return post_json(url, path, payload, timeout_s)

    def describe_traffic(self) -> str:
        with kserve_errors():
            now = self._read_inference_service()
        if now is None:
            return f"no InferenceService {self.settings.name} exists, so nothing gets traffic"
        if _read_storage_uri(now) != self.uri:
            return f"all traffic goes to revisions of {_read_storage_uri(now)}"
        percent = now["spec"]["predictor"].get("canaryTrafficPercent", 100)
        rest = f", {100 - percent} % to the previous revision" if percent < 100 else ""
        return f"{percent} % of the traffic goes to this rollout's revision{rest}"

    def post_request(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        with kserve_errors():
            status = (self._read_inference_service() or {}).get("status", {})
        traffic = status.get("components", {}).get("predictor", {}).get("traffic", ())
        tagged = next((entry["url"] for entry in traffic if entry.get("latestRevision") and entry.get("url")), "")
        url = tagged or (status.get("url", "") if self._alone else "")
        if not url:
            raise RequestFailed(
                f"the new revision has no address; expected the tagged one that {TAG_ROUTING_ANNOTATION} creates"
            )
        return post_json(url, path, payload, timeout_s)

    def shift_traffic(self, percent: int) -> None:
        if not self._alone:
            self._set_traffic_percent(percent)

    def finish_rollout(self) -> None:
        self._set_traffic_percent(None)

    def roll_back(self, rollout: str) -> None:
        with kserve_errors():
            now = self._read_inference_service()
        if now is None or _read_storage_uri(now) != self.uri:
            return
        if _is_created_by(now, rollout):
            with kserve_errors():
                self.cluster.delete(self.build_path())
        elif _shares_traffic(now):
            self._set_traffic_percent(0)  # pinned to the previous revision; the next rollout replaces the spec

    def _set_traffic_percent(self, percent: int | None) -> None:
        def set_percent(now: Json) -> Json:
            if _read_storage_uri(now) != self.uri:
                raise TargetFailed(
                    f"InferenceService {self.settings.name} was changed to another checkpoint during the rollout"
                )
            now["spec"]["predictor"].pop("canaryTrafficPercent", None)
            if percent is not None:
                now["spec"]["predictor"]["canaryTrafficPercent"] = percent
            return now

        with kserve_errors():
            self.cluster.update_with_retry(self.build_path(), set_percent)


def _is_created_by(now: Json, rollout: str) -> bool:
    """Whether a rollout has created the InferenceService, so that nothing was served before it."""
    return bool(now["metadata"].get("annotations", {}).get(CREATOR_ANNOTATION) == rollout)


def _shares_traffic(now: Json) -> bool:
    """Whether a rollout in Knative mode has given the newest revision a share, and has not finished."""
    return "canaryTrafficPercent" in now["spec"]["predictor"]


def check_deployment_mode(now: Json, wanted: str) -> None:
    """Raise TargetFailed if an InferenceService is in another of KServe's modes.

    KServe refuses a change of the mode (validateDeploymentMode, inference_service_validation.go). In Standard mode it
    ignores canaryTrafficPercent, so that a revision "with 0 %" would get all users at once.
    """
    annotations = now["metadata"].get("annotations", {})
    mode = now.get("status", {}).get("deploymentMode") or annotations.get(MODE_ANNOTATION, wanted)
    mode = _LEGACY_MODES.get(mode, mode)
    if mode != wanted:
        name = now["metadata"]["name"]
        raise TargetFailed(
            f"InferenceService {name} is in KServe's mode {mode}, and this rollout needs {wanted}, which KServe does "
            f"not change; set `mode` of the service's settings to a {mode} one, or give the service another name"
        )


def list_inherited_fields(stable: Json, predictor: Json, path: str = "") -> list[str]:
    """The fields of a predictor that a canary gets although its own spec does not have them.

    KServe merges a canary over the stable predictor (buildCanaryPredictor in components/predictor.go), so what the
    settings no longer have, such as a toleration, stays until the canary becomes the stable predictor.
    """
    inherited = []
    for name, value in stable.items():
        own = predictor.get(name)
        if not value or (not path and name in _OWN_FIELDS):
            continue
        if not own:
            inherited.append(path + name)
        elif isinstance(value, dict) and isinstance(own, dict):
            inherited += list_inherited_fields(value, own, f"{path}{name}.")
    return inherited


def _describe_unchanged(now: Json, rollout: str) -> str:
    """A note that a served object's settings were not changed.

    A rollout changes only the checkpoint. To change other settings, apply the output of --show-manifests with kubectl.
    """
    return "" if _is_created_by(now, rollout) else ", served already, its settings left as they are"


def _read_storage_uri(now: Json) -> str:
    return str(now["spec"]["predictor"].get("model", {}).get("storageUri", ""))


def _read_stable_name(now: Json) -> str:
    return str(now["spec"]["predictor"].get("name", "the unnamed predictor"))


def is_ready(now: Json) -> bool:
    """Whether KServe reports the object as ready.

    The status may lag behind the spec. KServe's observedGeneration does not show that: it is the Deployment's.
    """
    return bool(kubernetes.get_conditions(now).get("Ready", {}).get("status") == "True")


@contextlib.contextmanager
def kserve_errors() -> Iterator[None]:
    """Raise TargetFailed in place of ClusterFailed."""
    try:
        yield
    except ClusterFailed as error:
        raise TargetFailed(str(error)) from None
