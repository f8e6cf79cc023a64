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
from clincot.clients.kubernetes import Cluster, ClusterFailed, ObjectNotFound
from clincot.deployment import crd
from clincot.deployment.inference_service import (
    CRD_NAME,
    DIGEST_ANNOTATION,
    GROUP,
    PLURAL,
    TAG_ROUTING_ANNOTATION,
    VERSION,
    Json,
    build_canary,
    build_inference_service,
    build_predictor,
    build_revision_name,
)
from clincot.deployment.rollout import NotReady, RequestCounts, TargetFailed, parse_request_counts
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.smoke import RequestFailed, get_text, post_json

_METRICS_TIMEOUT_S = 10.0
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

    @abstractmethod
    def start_revision(self) -> str: ...

    @abstractmethod
    def check_ready(self) -> bool: ...

    @abstractmethod
    def post_request(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any: ...

    @abstractmethod
    def shift_traffic(self, percent: int) -> None: ...

    @abstractmethod
    def finish_rollout(self) -> None: ...

    @abstractmethod
    def roll_back(self) -> None: ...

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

    def read_request_counts(self) -> RequestCounts | None:
        return None

    def _read_service_counts(self, service: str) -> RequestCounts | None:
        """Read the server's own metrics; None if they cannot be read.

        With several replicas, the Service would return the metrics of an arbitrary one, so they are not used.
        """
        if self.settings.replicas > 1:
            return None
        try:
            if self.settings.service_url:
                return parse_request_counts(get_text(self._build_service_url(service), "/metrics", _METRICS_TIMEOUT_S))
            return parse_request_counts(self.cluster.request_text("GET", self._build_proxy_path(service, "/metrics")))
        except (ClusterFailed, RequestFailed):
            return None  # metrics are optional: treat the server as one without metrics

    def _build_proxy_path(self, service: str, path: str) -> str:
        return kubernetes.service_proxy_path(self.settings.namespace, service, path)

    def _build_service_url(self, service: str) -> str:
        return self.settings.service_url.format(service=service, namespace=self.settings.namespace)

    def _read_inference_service(self, name: str = "") -> Json | None:
        try:
            return self.cluster.get(self.build_path(name))
        except ObjectNotFound:
            return None

    def _update_readiness(self, ready: bool, model_status: Mapping[str, Any], what: str) -> bool:
        """Record the readiness and return it.

        Raises NotReady if it is lost, or can never be reached.
        """
        failure = model_status.get("lastFailureInfo") or {}
        if model_status.get("transitionStatus") in _FAILED_TRANSITIONS:
            raise NotReady(
                f"{what}: {model_status['transitionStatus']}: {failure.get('message') or failure.get('reason')}"
            )
        if self._ready and not ready:
            cause = failure.get("message") or "the logs of its pods may say why"
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
            raise RequestFailed(str(error)) from None


class CanaryTarget(KServeTarget):
    """A rollout with spec.canary[].

    The new revision is a second predictor, named after its checkpoint. Promotion makes it the stable predictor under
    the same name, so its pods keep running.
    """

    def build_manifest(self) -> Json:
        return build_inference_service(self.settings, self.digest, self.uri, mode="Standard")

    def validate_manifest(self) -> None:
        super().validate_manifest()
        self._validate_object(
            self.build_manifest() | {"spec": self.build_manifest()["spec"] | {"canary": [self._build_canary_entry(0)]}}
        )

    def start_revision(self) -> str:
        with kserve_errors():
            now = self._read_inference_service()
            if now is None:
                now = self.cluster.create(self.build_path(), self.build_manifest())
            self._alone = _read_stable_name(now) == self.revision
            if self._alone:
                return f"InferenceService {self.settings.name} with {self.revision} alone{_describe_unchanged(now)}"
            self._set_canary_share(0)
        return (
            f"{self.revision} beside {_read_stable_name(now)} of InferenceService {self.settings.name}, as spec.canary"
        )

    def check_ready(self) -> bool:
        with kserve_errors():
            now = self._read_inference_service()
        if now is None:
            raise NotReady(f"InferenceService {self.settings.name} does not exist any more")
        if self._alone:
            return self._update_readiness(
                is_ready(now), now.get("status", {}).get("modelStatus", {}), self.settings.name
            )
        statuses = now.get("status", {}).get("canaryStatuses", ())
        canary: Json = next((status for status in statuses if status["name"] == self.revision), {})
        return self._update_readiness(
            bool(canary.get("ready")), canary.get("modelStatus", {}), f"canary {self.revision}"
        )

    @property
    def backend_service(self) -> str:
        return f"{self.settings.name}-{self.revision}-predictor"

    def post_request(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        return self._post_to_service(self.backend_service, path, payload, timeout_s)

    def read_request_counts(self) -> RequestCounts | None:
        return self._read_service_counts(self.backend_service)

    def shift_traffic(self, percent: int) -> None:
        if not self._alone:
            with kserve_errors():
                self._set_canary_share(percent)

    def finish_rollout(self) -> None:
        def promote(now: Json) -> Json:
            if not self._alone:
                now["spec"]["predictor"] = build_predictor(self.settings, self.digest, self.uri, mode="Standard")
                now["spec"].pop("canary", None)
            now["metadata"].setdefault("annotations", {})[DIGEST_ANNOTATION] = self.digest
            return now

        with kserve_errors():
            self.cluster.update_with_retry(self.build_path(), promote)

    def roll_back(self) -> None:
        def remove_canary(now: Json) -> Json:
            canaries = now["spec"].pop("canary", ())
            others = [canary for canary in canaries if canary["predictor"]["name"] != self.revision]
            if others:
                now["spec"]["canary"] = others
            return now

        with kserve_errors():
            now = self._read_inference_service()
            if now is not None and _read_stable_name(now) != self.revision:
                self.cluster.update_with_retry(self.build_path(), remove_canary)
            elif now is not None and read_served_digest(now) is None:  # created by this rollout
                self.cluster.delete(self.build_path())

    def _build_canary_entry(self, percent: int) -> Json:
        return build_canary(self.settings, self.digest, self.uri, percent)

    def _set_canary_share(self, percent: int) -> None:
        def set_share(now: Json) -> Json:
            others = [canary["predictor"]["name"] for canary in now["spec"].get("canary", ())]
            if any(name != self.revision for name in others):
                raise TargetFailed(
                    f"InferenceService {self.settings.name} has the canary {others[0]} of another rollout"
                )
            now["spec"]["canary"] = [self._build_canary_entry(percent)]
            return now

        self.cluster.update_with_retry(self.build_path(), set_share)


class KnativeTarget(KServeTarget):
    """A rollout with canaryTrafficPercent.

    KServe leaves the rest of the traffic on the revision that last had all of it.
    """

    def build_manifest(self) -> Json:
        return build_inference_service(self.settings, self.digest, self.uri, mode="Knative")

    def start_revision(self) -> str:
        def add_revision(now: Json) -> Json:
            predictor = build_predictor(self.settings, self.digest, self.uri, mode="Knative")
            now["spec"]["predictor"] = predictor | {"canaryTrafficPercent": 0}
            return now

        with kserve_errors():
            now = self._read_inference_service()
            if now is None:
                now = self.cluster.create(self.build_path(), self.build_manifest())
            self._alone = read_served_digest(now) is None or (
                read_served_digest(now) == self.digest and _read_storage_uri(now) == self.uri
            )
            if not self._alone:
                self.cluster.update_with_retry(self.build_path(), add_revision)
        how = _describe_unchanged(now) if self._alone else ", canaryTrafficPercent 0"
        return f"a revision of InferenceService {self.settings.name}{how}"

    def check_ready(self) -> bool:
        with kserve_errors():
            now = self._read_inference_service()
        if now is None:
            raise NotReady(f"InferenceService {self.settings.name} does not exist any more")
        status = now.get("status", {})
        predictor = status.get("components", {}).get("predictor", {})
        newest = predictor.get("latestCreatedRevision", "")
        # The status lags behind: at first it still names the old revision, which has all traffic, as the newest.
        is_new = self._alone or self._ready or newest != predictor.get("latestRolledoutRevision")
        ready = bool(newest and is_new and newest == predictor.get("latestReadyRevision") and is_ready(now))
        return self._update_readiness(ready, status.get("modelStatus", {}), self.settings.name)

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

    def roll_back(self) -> None:
        with kserve_errors():
            now = self._read_inference_service()
        if now is None or _read_storage_uri(now) != self.uri:
            return
        if read_served_digest(now) is None:  # created by this rollout
            with kserve_errors():
                self.cluster.delete(self.build_path())
        elif read_served_digest(now) != self.digest:
            self._set_traffic_percent(0)  # pinned to the previous revision; the next rollout replaces the spec

    def _set_traffic_percent(self, percent: int | None) -> None:
        def set_percent(now: Json) -> Json:
            if _read_storage_uri(now) != self.uri:
                raise TargetFailed(
                    f"InferenceService {self.settings.name} was changed to another checkpoint during the rollout"
                )
            now["spec"]["predictor"].pop("canaryTrafficPercent", None)
            if percent is None:
                now["metadata"].setdefault("annotations", {})[DIGEST_ANNOTATION] = self.digest
            else:
                now["spec"]["predictor"]["canaryTrafficPercent"] = percent
            return now

        with kserve_errors():
            self.cluster.update_with_retry(self.build_path(), set_percent)


def read_served_digest(now: Json) -> str | None:
    """The checkpoint of the last finished rollout; None if no rollout has finished."""
    digest: str | None = now["metadata"].get("annotations", {}).get(DIGEST_ANNOTATION)
    return digest


def _describe_unchanged(now: Json) -> str:
    """A note that a served object's settings were not changed.

    A rollout changes only the checkpoint. To change other settings, apply the output of --show-manifests with kubectl.
    """
    return "" if read_served_digest(now) is None else ", served already, its settings left as they are"


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
