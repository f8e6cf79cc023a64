"""Rollouts on KServe (0.20 and later) by its own means: spec.canary[], and canaryTrafficPercent in Knative mode.

Every change is a read, a change of what is ours, and a write over what was read. deployment/targets/select.py chooses the way.
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
    """What the three ways have in common. One object is one rollout of one checkpoint."""

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
        self._alone = False  # no other revision is there to share the traffic with

    @property
    def steps(self) -> tuple[int, ...]:
        return (100,) if self._alone else self._steps

    @property
    def model(self) -> str:
        return self.settings.name

    def build_path(self, name: str = "") -> str:
        return kubernetes.resource_path(GROUP, VERSION, self.settings.namespace, PLURAL, name or self.settings.name)

    @abstractmethod
    def build_manifest(self) -> Json:
        """What will be applied where nothing is yet."""

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
        """Against the CRD of the cluster, or the one given. Raises crd.InvalidManifest, TargetFailed."""
        if self._validator is None:
            with kserve_errors():
                found = self.cluster.get(kubernetes.crd_path(CRD_NAME))
            self._validator = crd.build_validator(found, VERSION)
        self._validate_object(self.build_manifest())

    def _validate_object(self, manifest: Json) -> None:
        if self._validator is None:
            raise AssertionError("validate() comes first")
        crd.validate_manifest(manifest, self._validator)

    def read_request_counts(self) -> RequestCounts | None:
        return None

    def _read_service_counts(self, service: str) -> RequestCounts | None:
        """From the server's own metrics; of several replicas one would answer for all, so none is asked."""
        if self.settings.replicas > 1:
            return None
        try:
            if self.settings.service_url:
                return parse_request_counts(get_text(self._build_service_url(service), "/metrics", _METRICS_TIMEOUT_S))
            return parse_request_counts(self.cluster.request_text("GET", self._build_proxy_path(service, "/metrics")))
        except (ClusterFailed, RequestFailed):  # one that cannot say it is no worse than one that does not count
            return None

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
        """Ready or not; NotReady where it never will be, or no longer is."""
        failure = model_status.get("lastFailureInfo") or {}
        if model_status.get("transitionStatus") in _FAILED_TRANSITIONS:
            raise NotReady(
                f"{what}: {model_status['transitionStatus']}: {failure.get('message') or failure.get('reason')}"
            )
        if self._ready and not ready:
            raise NotReady(f"{what} was ready and is no longer; {failure.get('message') or 'its pods say why'}")
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
    """spec.canary[]. The new revision is a predictor of its own name; promotion moves the name, pods stay."""

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
            raise NotReady(f"InferenceService {self.settings.name} is gone")
        if self._alone:
            return self._update_readiness(
                is_ready(now), now.get("status", {}).get("modelStatus", {}), self.settings.name
            )
        found: Json = next(
            (c for c in now.get("status", {}).get("canaryStatuses", ()) if c["name"] == self.revision), {}
        )
        return self._update_readiness(bool(found.get("ready")), found.get("modelStatus", {}), f"canary {self.revision}")

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
        def promoted(now: Json) -> Json:
            if not self._alone:
                now["spec"]["predictor"] = build_predictor(self.settings, self.digest, self.uri, mode="Standard")
                now["spec"].pop("canary", None)
            now["metadata"].setdefault("annotations", {})[DIGEST_ANNOTATION] = self.digest
            return now

        with kserve_errors():
            self.cluster.update_with_retry(self.build_path(), promoted)

    def roll_back(self) -> None:
        def without(now: Json) -> Json:
            rest = [one for one in now["spec"].get("canary", ()) if one["predictor"]["name"] != self.revision]
            now["spec"].pop("canary", None)
            return now | ({"spec": now["spec"] | {"canary": rest}} if rest else {})

        with kserve_errors():
            now = self._read_inference_service()
            if now is not None and _read_stable_name(now) != self.revision:
                self.cluster.update_with_retry(self.build_path(), without)
            elif now is not None and read_served_digest(now) is None:  # made by this rollout
                self.cluster.delete(self.build_path())

    def _build_canary_entry(self, percent: int) -> Json:
        return build_canary(self.settings, self.digest, self.uri, percent)

    def _set_canary_share(self, percent: int) -> None:
        def shared(now: Json) -> Json:
            others = [one["predictor"]["name"] for one in now["spec"].get("canary", ())]
            if any(name != self.revision for name in others):
                raise TargetFailed(
                    f"InferenceService {self.settings.name} has the canary {others[0]} of another rollout"
                )
            now["spec"]["canary"] = [self._build_canary_entry(percent)]
            return now

        self.cluster.update_with_retry(self.build_path(), shared)


class KnativeTarget(KServeTarget):
    """canaryTrafficPercent: KServe keeps the rest of the traffic on the revision that last had all of it."""

    def build_manifest(self) -> Json:
        return build_inference_service(self.settings, self.digest, self.uri, mode="Knative")

    def start_revision(self) -> str:
        def beside(now: Json) -> Json:
            new = build_predictor(self.settings, self.digest, self.uri, mode="Knative")
            now["spec"]["predictor"] = new | {"canaryTrafficPercent": 0}
            return now

        with kserve_errors():
            now = self._read_inference_service()
            if now is None:
                now = self.cluster.create(self.build_path(), self.build_manifest())
            self._alone = read_served_digest(now) is None or (
                read_served_digest(now) == self.digest and _read_storage_uri(now) == self.uri
            )
            if not self._alone:
                self.cluster.update_with_retry(self.build_path(), beside)
        how = _describe_unchanged(now) if self._alone else ", canaryTrafficPercent 0"
        return f"a revision of InferenceService {self.settings.name}{how}"

    def check_ready(self) -> bool:
        with kserve_errors():
            now = self._read_inference_service()
        if now is None:
            raise NotReady(f"InferenceService {self.settings.name} is gone")
        status = now.get("status", {})
        part = status.get("components", {}).get("predictor", {})
        newest = part.get("latestCreatedRevision", "")
        # Until the status speaks of the new revision it calls the old one, which has all of the traffic, the newest.
        new = self._alone or self._ready or newest != part.get("latestRolledoutRevision")
        ready = bool(newest and new and newest == part.get("latestReadyRevision") and is_ready(now))
        return self._update_readiness(ready, status.get("modelStatus", {}), self.settings.name)

    def post_request(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        with kserve_errors():
            status = (self._read_inference_service() or {}).get("status", {})
        traffic = status.get("components", {}).get("predictor", {}).get("traffic", ())
        tagged = next((one["url"] for one in traffic if one.get("latestRevision") and one.get("url")), "")
        url = tagged or (status.get("url", "") if self._alone else "")
        if not url:
            raise RequestFailed(
                f"the new revision has no address of its own; expected the tag that {TAG_ROUTING_ANNOTATION} gives"
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
        if read_served_digest(now) is None:  # made by this rollout
            with kserve_errors():
                self.cluster.delete(self.build_path())
        elif read_served_digest(now) != self.digest:
            self._set_traffic_percent(0)  # pinned to the revision before; the next rollout writes over the spec

    def _set_traffic_percent(self, percent: int | None) -> None:
        def shared(now: Json) -> Json:
            if _read_storage_uri(now) != self.uri:
                raise TargetFailed(f"InferenceService {self.settings.name} was given another checkpoint meanwhile")
            now["spec"]["predictor"].pop("canaryTrafficPercent", None)
            if percent is None:
                now["metadata"].setdefault("annotations", {})[DIGEST_ANNOTATION] = self.digest
            else:
                now["spec"]["predictor"]["canaryTrafficPercent"] = percent
            return now

        with kserve_errors():
            self.cluster.update_with_retry(self.build_path(), shared)


def read_served_digest(now: Json) -> str | None:
    """The checkpoint whose rollout was finished; None where none ever was."""
    found: str | None = now["metadata"].get("annotations", {}).get(DIGEST_ANNOTATION)
    return found


def _describe_unchanged(now: Json) -> str:
    """A rollout moves checkpoints. Other settings of what is served already are `kubectl`'s (--show-manifests)."""
    return "" if read_served_digest(now) is None else ", served already, its settings left as they are"


def _read_storage_uri(now: Json) -> str:
    return str(now["spec"]["predictor"].get("model", {}).get("storageUri", ""))


def _read_stable_name(now: Json) -> str:
    return str(now["spec"]["predictor"].get("name", "the unnamed predictor"))


def is_ready(now: Json) -> bool:
    """KServe's own word. Its observedGeneration is the Deployment's, so it does not tell a status that lags behind."""
    return bool(kubernetes.get_conditions(now).get("Ready", {}).get("status") == "True")


@contextlib.contextmanager
def kserve_errors() -> Iterator[None]:
    """What the cluster refuses is the target's failure."""
    try:
        yield
    except ClusterFailed as error:
        raise TargetFailed(str(error)) from None
