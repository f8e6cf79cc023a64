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
from clincot.clients.kubernetes import Cluster, ClusterFailed, Missing
from clincot.deployment import crd
from clincot.deployment.inference_service import (
    CRD,
    DIGEST,
    GROUP,
    PLURAL,
    TAGS,
    VERSION,
    Json,
    canary,
    inference_service,
    predictor,
    revision_name,
)
from clincot.deployment.rollout import Counts, NotReady, TargetFailed, counts_of
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.smoke import RequestFailed, get_text, post_json

_METRICS_S = 10.0
_FAILED = {"BlockedByFailedLoad", "InvalidSpec"}


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
        self.revision = revision_name(digest)
        self._steps, self._validator = steps, validator
        self._ready = False
        self._alone = False  # no other revision is there to share the traffic with

    @property
    def steps(self) -> tuple[int, ...]:
        return (100,) if self._alone else self._steps

    @property
    def model(self) -> str:
        return self.settings.name

    def path(self, name: str = "") -> str:
        return kubernetes.resource_path(GROUP, VERSION, self.settings.namespace, PLURAL, name or self.settings.name)

    @abstractmethod
    def manifest(self) -> Json:
        """What will be applied where nothing is yet."""

    @abstractmethod
    def start(self) -> str: ...

    @abstractmethod
    def check(self) -> bool: ...

    @abstractmethod
    def post(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any: ...

    @abstractmethod
    def shift(self, percent: int) -> None: ...

    @abstractmethod
    def finish(self) -> None: ...

    @abstractmethod
    def undo(self) -> None: ...

    def validate(self) -> None:
        """Against the CRD of the cluster, or the one given. Raises crd.InvalidManifest, TargetFailed."""
        if self._validator is None:
            with told():
                found = self.cluster.get(kubernetes.crd_path(CRD))
            self._validator = crd.validator_of(found, VERSION)
        self._check(self.manifest())

    def _check(self, manifest: Json) -> None:
        if self._validator is None:
            raise AssertionError("validate() comes first")
        crd.check(manifest, self._validator)

    def counts(self) -> Counts | None:
        return None

    def _counted(self, service: str) -> Counts | None:
        """From the server's own metrics; of several replicas one would answer for all, so none is asked."""
        if self.settings.replicas > 1:
            return None
        try:
            if self.settings.service_url:
                return counts_of(get_text(self._own_url(service), "/metrics", _METRICS_S))
            return counts_of(self.cluster.text("GET", self._at(service, "/metrics")))
        except (ClusterFailed, RequestFailed):  # one that cannot say it is no worse than one that does not count
            return None

    def _at(self, service: str, path: str) -> str:
        return kubernetes.service_proxy_path(self.settings.namespace, service, path)

    def _own_url(self, service: str) -> str:
        return self.settings.service_url.format(service=service, namespace=self.settings.namespace)

    def _read(self, name: str = "") -> Json | None:
        try:
            return self.cluster.get(self.path(name))
        except Missing:
            return None

    def _judge(self, ready: bool, model_status: Mapping[str, Any], what: str) -> bool:
        """Ready or not; NotReady where it never will be, or no longer is."""
        failure = model_status.get("lastFailureInfo") or {}
        if model_status.get("transitionStatus") in _FAILED:
            raise NotReady(
                f"{what}: {model_status['transitionStatus']}: {failure.get('message') or failure.get('reason')}"
            )
        if self._ready and not ready:
            raise NotReady(f"{what} was ready and is no longer; {failure.get('message') or 'its pods say why'}")
        self._ready = self._ready or ready
        return ready

    def _proxied(self, service: str, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        if self.settings.service_url:
            return post_json(self._own_url(service), path, payload, timeout_s)
        try:
            return self.cluster.request("POST", self._at(service, path), dict(payload), timeout_s=timeout_s)
        except ClusterFailed as error:
            raise RequestFailed(str(error)) from None


class CanaryTarget(KServeTarget):
    """spec.canary[]. The new revision is a predictor of its own name; promotion moves the name, pods stay."""

    def manifest(self) -> Json:
        return inference_service(self.settings, self.digest, self.uri, mode="Standard")

    def validate(self) -> None:
        super().validate()
        self._check(self.manifest() | {"spec": self.manifest()["spec"] | {"canary": [self._entry(0)]}})

    def start(self) -> str:
        with told():
            now = self._read()
            if now is None:
                now = self.cluster.create(self.path(), self.manifest())
            self._alone = _stable(now) == self.revision
            if self._alone:
                return f"InferenceService {self.settings.name} with {self.revision} alone{_as_it_is(now)}"
            self._set_share(0)
        return f"{self.revision} beside {_stable(now)} of InferenceService {self.settings.name}, as spec.canary"

    def check(self) -> bool:
        with told():
            now = self._read()
        if now is None:
            raise NotReady(f"InferenceService {self.settings.name} is gone")
        if self._alone:
            return self._judge(is_ready(now), now.get("status", {}).get("modelStatus", {}), self.settings.name)
        found: Json = next(
            (c for c in now.get("status", {}).get("canaryStatuses", ()) if c["name"] == self.revision), {}
        )
        return self._judge(bool(found.get("ready")), found.get("modelStatus", {}), f"canary {self.revision}")

    @property
    def backend(self) -> str:
        return f"{self.settings.name}-{self.revision}-predictor"

    def post(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        return self._proxied(self.backend, path, payload, timeout_s)

    def counts(self) -> Counts | None:
        return self._counted(self.backend)

    def shift(self, percent: int) -> None:
        if not self._alone:
            with told():
                self._set_share(percent)

    def finish(self) -> None:
        def promoted(now: Json) -> Json:
            if not self._alone:
                now["spec"]["predictor"] = predictor(self.settings, self.digest, self.uri, mode="Standard")
                now["spec"].pop("canary", None)
            now["metadata"].setdefault("annotations", {})[DIGEST] = self.digest
            return now

        with told():
            self.cluster.change(self.path(), promoted)

    def undo(self) -> None:
        def without(now: Json) -> Json:
            rest = [one for one in now["spec"].get("canary", ()) if one["predictor"]["name"] != self.revision]
            now["spec"].pop("canary", None)
            return now | ({"spec": now["spec"] | {"canary": rest}} if rest else {})

        with told():
            now = self._read()
            if now is not None and _stable(now) != self.revision:
                self.cluster.change(self.path(), without)
            elif now is not None and served(now) is None:  # made by this rollout
                self.cluster.delete(self.path())

    def _entry(self, percent: int) -> Json:
        return canary(self.settings, self.digest, self.uri, percent)

    def _set_share(self, percent: int) -> None:
        def shared(now: Json) -> Json:
            others = [one["predictor"]["name"] for one in now["spec"].get("canary", ())]
            if any(name != self.revision for name in others):
                raise TargetFailed(
                    f"InferenceService {self.settings.name} has the canary {others[0]} of another rollout"
                )
            now["spec"]["canary"] = [self._entry(percent)]
            return now

        self.cluster.change(self.path(), shared)


class KnativeTarget(KServeTarget):
    """canaryTrafficPercent: KServe keeps the rest of the traffic on the revision that last had all of it."""

    def manifest(self) -> Json:
        return inference_service(self.settings, self.digest, self.uri, mode="Knative")

    def start(self) -> str:
        def beside(now: Json) -> Json:
            new = predictor(self.settings, self.digest, self.uri, mode="Knative")
            now["spec"]["predictor"] = new | {"canaryTrafficPercent": 0}
            return now

        with told():
            now = self._read()
            if now is None:
                now = self.cluster.create(self.path(), self.manifest())
            self._alone = served(now) is None or (served(now) == self.digest and _uri(now) == self.uri)
            if not self._alone:
                self.cluster.change(self.path(), beside)
        how = _as_it_is(now) if self._alone else ", canaryTrafficPercent 0"
        return f"a revision of InferenceService {self.settings.name}{how}"

    def check(self) -> bool:
        with told():
            now = self._read()
        if now is None:
            raise NotReady(f"InferenceService {self.settings.name} is gone")
        status = now.get("status", {})
        part = status.get("components", {}).get("predictor", {})
        newest = part.get("latestCreatedRevision", "")
        # Until the status speaks of the new revision it calls the old one, which has all of the traffic, the newest.
        new = self._alone or self._ready or newest != part.get("latestRolledoutRevision")
        ready = bool(newest and new and newest == part.get("latestReadyRevision") and is_ready(now))
        return self._judge(ready, status.get("modelStatus", {}), self.settings.name)

    def post(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        with told():
            status = (self._read() or {}).get("status", {})
        traffic = status.get("components", {}).get("predictor", {}).get("traffic", ())
        tagged = next((one["url"] for one in traffic if one.get("latestRevision") and one.get("url")), "")
        url = tagged or (status.get("url", "") if self._alone else "")
        if not url:
            raise RequestFailed(f"the new revision has no address of its own; expected the tag that {TAGS} gives")
        return post_json(url, path, payload, timeout_s)

    def shift(self, percent: int) -> None:
        if not self._alone:
            self._set(percent)

    def finish(self) -> None:
        self._set(None)

    def undo(self) -> None:
        with told():
            now = self._read()
        if now is None or _uri(now) != self.uri:
            return
        if served(now) is None:  # made by this rollout
            with told():
                self.cluster.delete(self.path())
        elif served(now) != self.digest:
            self._set(0)  # pinned to the revision before; the next rollout writes over the spec

    def _set(self, percent: int | None) -> None:
        def shared(now: Json) -> Json:
            if _uri(now) != self.uri:
                raise TargetFailed(f"InferenceService {self.settings.name} was given another checkpoint meanwhile")
            now["spec"]["predictor"].pop("canaryTrafficPercent", None)
            if percent is None:
                now["metadata"].setdefault("annotations", {})[DIGEST] = self.digest
            else:
                now["spec"]["predictor"]["canaryTrafficPercent"] = percent
            return now

        with told():
            self.cluster.change(self.path(), shared)


def served(now: Json) -> str | None:
    """The checkpoint whose rollout was finished; None where none ever was."""
    found: str | None = now["metadata"].get("annotations", {}).get(DIGEST)
    return found


def _as_it_is(now: Json) -> str:
    """A rollout moves checkpoints. Other settings of what is served already are `kubectl`'s (--show-manifests)."""
    return "" if served(now) is None else ", served already, its settings left as they are"


def _uri(now: Json) -> str:
    return str(now["spec"]["predictor"].get("model", {}).get("storageUri", ""))


def _stable(now: Json) -> str:
    return str(now["spec"]["predictor"].get("name", "the unnamed predictor"))


def is_ready(now: Json) -> bool:
    """KServe's own word. Its observedGeneration is the Deployment's, so it does not tell a status that lags behind."""
    return bool(kubernetes.conditions(now).get("Ready", {}).get("status") == "True")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What the cluster refuses is the target's failure."""
    try:
        yield
    except ClusterFailed as error:
        raise TargetFailed(str(error)) from None
