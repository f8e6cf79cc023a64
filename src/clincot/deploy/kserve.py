"""Rollouts on KServe (0.20 and later), by what the cluster offers.

    canary       Standard mode, Gateway API: spec.canary[], a second predictor with its share
    knative      Knative mode: canaryTrafficPercent, the revision before keeps the rest
    blue-green   Standard mode without Gateway API (KServe ignores canaryTrafficPercent there in silence), or with a
                 transformer of its own: a second InferenceService, and a Service of ours in front that selects one

Every change is a read, a change of what is ours, and a write over what was read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from jsonschema import Draft202012Validator

from clincot import cluster as kubernetes
from clincot.cluster import Cluster, ClusterFailed, Conflict, Forbidden, Missing
from clincot.deploy import crd
from clincot.deploy.inference_service import (
    CRD,
    DIGEST,
    GROUP,
    PLURAL,
    VERSION,
    Json,
    canary,
    inference_service,
    predictor,
    revision_name,
)
from clincot.deploy.manifest import Manifest
from clincot.deploy.rollout import Counts, NotReady, TargetFailed, counts_of
from clincot.deploy.service import ServiceSettings
from clincot.deploy.smoke import RequestFailed, post_json

Mode = Literal["canary", "knative", "blue-green"]
SERVICE, BEFORE = "clincot/service", "clincot/before"  # a label; an annotation of the front: what it selected before
_FAILED = {"BlockedByFailedLoad", "InvalidSpec"}


def kserve_target(
    cluster: Cluster, settings: ServiceSettings, manifest: Manifest, steps: tuple[int, ...],
    validator: Draft202012Validator | None = None,
) -> KServeTarget:  # fmt: skip
    """The target for a checkpoint, as the cluster can. Raises TargetFailed."""
    if not manifest.uri.startswith("s3://"):
        raise TargetFailed(
            f"a cluster cannot read {manifest.uri}; publish to an S3 store, or deploy with --target local"
        )
    mode, why = choose_mode(cluster, settings)
    return TARGETS[mode](
        cluster, settings, manifest.sha256, manifest.uri, steps, validator=validator, how=f"{mode}, {why}"
    )


def choose_mode(cluster: Cluster, settings: ServiceSettings) -> tuple[Mode, str]:
    """How traffic is moved here, and why so. Raises TargetFailed where what was asked for cannot be had."""
    with _told():
        knative = cluster.has_api("serving.knative.dev", "v1")
    separate = settings.transformer == "separate"
    if settings.mode == "knative" or (
        settings.mode == "auto" and knative and _default_mode(cluster, settings) == "Knative"
    ):
        if not knative:
            raise TargetFailed("mode knative was asked for, but the cluster does not serve serving.knative.dev/v1")
        if separate:
            raise TargetFailed(
                "in Knative mode each request of a transformer of its own may meet another revision of the predictor; "
                "set transformer: collocated"
            )
        return "knative", "KServe runs in Knative mode: canaryTrafficPercent"
    if settings.mode == "blue-green":
        return "blue-green", "as asked for"
    gateway, why = _gateway(cluster, settings)
    if separate:
        why = "KServe sends a canary's share past a transformer of its own; set transformer: collocated for steps"
    elif gateway:
        return "canary", f"{why}: spec.canary[]"
    if settings.mode == "standard":
        raise TargetFailed(f"mode standard was asked for, but spec.canary[] would do nothing here: {why}")
    return "blue-green", f"{why}; all of the traffic moves at once"


def _default_mode(cluster: Cluster, settings: ServiceSettings) -> str:
    found = _config(cluster, settings, "deploy").get("defaultDeploymentMode", "Standard")
    return "Knative" if found in ("Knative", "Serverless") else "Standard"


def _gateway(cluster: Cluster, settings: ServiceSettings) -> tuple[bool, str]:
    if settings.gateway_api != "auto":
        return settings.gateway_api == "yes", f"gateway_api is set to {settings.gateway_api}"
    with _told():
        if not cluster.has_api("gateway.networking.k8s.io", "v1"):
            return False, "the cluster has no Gateway API (gateway.networking.k8s.io/v1)"
    if _config(cluster, settings, "ingress").get("enableGatewayApi") is not True:
        return False, "KServe does not use the Gateway API (enableGatewayApi is not true in inferenceservice-config)"
    return True, "KServe routes through the Gateway API"


def _config(cluster: Cluster, settings: ServiceSettings, part: str) -> Json:
    """One part of KServe's own configuration."""
    path = kubernetes.resource_path("", "v1", settings.kserve_namespace, "configmaps", "inferenceservice-config")
    try:
        found: Json = json.loads(cluster.get(path).get("data", {}).get(part, "{}"))
    except Missing:
        raise TargetFailed(f"{path}: KServe's configuration is not there; is kserve_namespace right?") from None
    except Forbidden as error:
        raise TargetFailed(f"{error}; or set mode and gateway_api in the service's settings") from None
    except ClusterFailed as error:
        raise TargetFailed(str(error)) from None
    except ValueError as error:
        raise TargetFailed(f"{path}: {part} is not JSON: {error}") from None
    return found


class KServeTarget:
    """What the three ways have in common. One object is one rollout of one checkpoint."""

    def __init__(
        self, cluster: Cluster, settings: ServiceSettings, digest: str, uri: str, steps: tuple[int, ...],
        *, validator: Draft202012Validator | None = None, how: str = "as asked for",
    ) -> None:  # fmt: skip
        self.how = how
        self.cluster, self.settings, self.digest, self.uri = cluster, settings, digest, uri
        self.revision = revision_name(digest)
        self._steps, self._validator = steps, validator
        self._ready = False
        self._alone = False  # no other revision is there to share the traffic with

    steps = property(lambda self: (100,) if self._alone else self._steps)
    model = property(lambda self: self.settings.name)

    def path(self, name: str = "") -> str:
        return kubernetes.resource_path(GROUP, VERSION, self.settings.namespace, PLURAL, name or self.settings.name)

    def manifest(self) -> Json:
        """What will be applied where nothing is yet."""
        raise NotImplementedError

    def validate(self) -> None:
        """Against the CRD of the cluster, or the one given. Raises crd.InvalidManifest, TargetFailed."""
        if self._validator is None:
            with _told():
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
            return counts_of(self.cluster.text("GET", self._at(service, "/metrics")))
        except ClusterFailed:  # a revision that cannot say how it does is no worse than one that does not count
            return None

    def _at(self, service: str, path: str) -> str:
        return kubernetes.service_proxy_path(self.settings.namespace, service, path)

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
            url = self.settings.service_url.format(service=service, namespace=self.settings.namespace)
            return post_json(url, path, payload, timeout_s)
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
        with _told():
            now = self._read()
            if now is None:
                now = self.cluster.create(self.path(), self.manifest())
            self._alone = _stable(now) == self.revision
            if self._alone:
                return f"InferenceService {self.settings.name} with {self.revision} alone"
            self._set_share(0)
        return f"{self.revision} beside {_stable(now)} of InferenceService {self.settings.name}, as spec.canary"

    def check(self) -> bool:
        with _told():
            now = self._read()
        if now is None:
            raise NotReady(f"InferenceService {self.settings.name} is gone")
        if self._alone:
            return self._judge(_ready(now), now.get("status", {}).get("modelStatus", {}), self.settings.name)
        found = next((c for c in now.get("status", {}).get("canaryStatuses", ()) if c["name"] == self.revision), {})
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
            with _told():
                self._set_share(percent)

    def finish(self) -> None:
        def promoted(now: Json) -> Json:
            if not self._alone:
                now["spec"]["predictor"] = predictor(self.settings, self.digest, self.uri, mode="Standard")
                now["spec"].pop("canary", None)
            now["metadata"].setdefault("annotations", {})[DIGEST] = self.digest
            return now

        with _told():
            self.cluster.change(self.path(), promoted)

    def undo(self) -> None:
        def without(now: Json) -> Json:
            rest = [one for one in now["spec"].get("canary", ()) if one["predictor"]["name"] != self.revision]
            now["spec"].pop("canary", None)
            return now | ({"spec": now["spec"] | {"canary": rest}} if rest else {})

        with _told():
            now = self._read()
            if now is not None and _stable(now) != self.revision:
                self.cluster.change(self.path(), without)
            elif now is not None and _served(now) is None:  # made by this rollout
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

        with _told():
            now = self._read()
            if now is None:
                now = self.cluster.create(self.path(), self.manifest())
            self._alone = _served(now) is None or (_served(now) == self.digest and _uri(now) == self.uri)
            if not self._alone:
                self.cluster.change(self.path(), beside)
        return f"a revision of InferenceService {self.settings.name}" + (
            "" if self._alone else ", canaryTrafficPercent 0"
        )

    def check(self) -> bool:
        with _told():
            now = self._read()
        if now is None:
            raise NotReady(f"InferenceService {self.settings.name} is gone")
        status = now.get("status", {})
        part = status.get("components", {}).get("predictor", {})
        seen = status.get("observedGeneration", 0) >= now["metadata"].get("generation", 0)  # else it speaks of the old
        newest = part.get("latestCreatedRevision") and part["latestCreatedRevision"] == part.get("latestReadyRevision")
        return self._judge(bool(seen and newest and _ready(now)), status.get("modelStatus", {}), self.settings.name)

    def post(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        with _told():
            status = (self._read() or {}).get("status", {})
        traffic = status.get("components", {}).get("predictor", {}).get("traffic", ())
        tagged = next((one["url"] for one in traffic if one.get("latestRevision") and one.get("url")), "")
        url = tagged or (status.get("url", "") if self._alone else "")
        if not url:
            raise RequestFailed(f"the new revision has no address of its own; expected the tag that {TAG_HINT} gives")
        return post_json(url, path, payload, timeout_s)

    def shift(self, percent: int) -> None:
        if not self._alone:
            self._set(percent)

    def finish(self) -> None:
        self._set(None)

    def undo(self) -> None:
        with _told():
            now = self._read()
        if now is None or _uri(now) != self.uri:
            return
        if _served(now) is None:  # made by this rollout
            with _told():
                self.cluster.delete(self.path())
        elif _served(now) != self.digest:
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

        with _told():
            self.cluster.change(self.path(), shared)


class BlueGreenTarget(KServeTarget):
    """A second InferenceService and a Service in front. The one before is kept until the next rollout."""

    steps = property(lambda self: (100,))

    @property
    def own(self) -> str:
        return f"{self.settings.name}-{self.revision}"

    @property
    def backend(self) -> str:
        """The Service in front of this revision's pods."""
        return f"{self.own}-{'transformer' if self.settings.transformer == 'separate' else 'predictor'}"

    def manifest(self) -> Json:
        manifest = inference_service(self.settings, self.digest, self.uri, name=self.own, mode="Standard")
        manifest["spec"]["predictor"].pop("name", None)
        manifest["metadata"]["labels"][SERVICE] = self.settings.name
        return manifest

    def start(self) -> str:
        with _told():
            front = self._front()
            try:
                self.cluster.create(self.path(self.own), self.manifest())
            except Conflict:  # an attempt of ours before this one: the name holds the digest
                return f"InferenceService {self.own} is there already"
        before = "" if front is None else f" beside {front['spec']['selector'].get('app', '')}"
        return f"InferenceService {self.own}{before}"

    def check(self) -> bool:
        with _told():
            now = self._read(self.own)
        if now is None:
            raise NotReady(f"InferenceService {self.own} is gone")
        return self._judge(_ready(now), now.get("status", {}).get("modelStatus", {}), self.own)

    def post(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        return self._proxied(self.backend, path, payload, timeout_s)

    def counts(self) -> Counts | None:
        return self._counted(self.backend)

    def shift(self, percent: int) -> None:
        if percent != 100:
            raise TargetFailed(f"blue-green moves all of the traffic at once, not {percent} %")
        ours = {"app": f"isvc.{self.backend}"}  # how KServe labels the pods of a component

        def turned(front: Json) -> Json:
            if front["spec"]["selector"] != ours:
                front["metadata"].setdefault("annotations", {})[BEFORE] = json.dumps(front["spec"]["selector"])
                front["spec"]["selector"] = ours
            return front

        with _told():
            if self._front() is None:
                self.cluster.create(self._front_path(), self._new_front(ours))
            else:
                self.cluster.change(self._front_path(), turned)

    def finish(self) -> None:
        """What served before the one before is taken away."""

        def marked(front: Json) -> Json:
            front["metadata"].setdefault("annotations", {})[DIGEST] = self.digest
            return front

        with _told():
            front = self.cluster.change(self._front_path(), marked)
            kept = {
                f"isvc.{self.backend}",
                json.loads(front["metadata"]["annotations"].get(BEFORE, "{}")).get("app", ""),
            }
            at = kubernetes.resource_path(GROUP, VERSION, self.settings.namespace, PLURAL)
            for one in self.cluster.get(at).get("items", ()):
                name, labels = one["metadata"]["name"], one["metadata"].get("labels", {})
                backends = {f"isvc.{name}-transformer", f"isvc.{name}-predictor"}
                if labels.get(SERVICE) == self.settings.name and not backends & kept:
                    self.cluster.delete(self.path(name))

    def undo(self) -> None:
        def back(front: Json) -> Json:
            before = json.loads(front["metadata"].get("annotations", {}).get(BEFORE, "{}"))
            if front["spec"]["selector"] == {"app": f"isvc.{self.backend}"} and before:
                front["spec"]["selector"] = before
            return front

        with _told():
            front = self._front()
            if front is not None and _served(front) == self.digest:
                return  # it had all of the traffic before this rollout
            if front is not None:
                front = self.cluster.change(self._front_path(), back)
                if front["spec"]["selector"] == {"app": f"isvc.{self.backend}"}:  # nothing was served before
                    self.cluster.delete(self._front_path())
            self.cluster.delete(self.path(self.own))

    def _front(self) -> Json | None:
        try:
            return self.cluster.get(self._front_path())
        except Missing:
            return None

    def _front_path(self) -> str:
        return kubernetes.resource_path("", "v1", self.settings.namespace, "services", self.settings.name)

    def _new_front(self, selector: Json) -> Json:
        return {
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": self.settings.name, "namespace": self.settings.namespace, "annotations": {},
                         "labels": {"app.kubernetes.io/managed-by": "clincot"}},
            "spec": {"selector": selector, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
        }  # fmt: skip


TAG_HINT = "serving.kserve.io/enable-tag-routing"
TARGETS: dict[Mode, type[KServeTarget]] = {
    "canary": CanaryTarget, "knative": KnativeTarget, "blue-green": BlueGreenTarget,
}  # fmt: skip


def _served(now: Json) -> str | None:
    """The checkpoint whose rollout was finished; None where none ever was."""
    found: str | None = now["metadata"].get("annotations", {}).get(DIGEST)
    return found


def _uri(now: Json) -> str:
    return str(now["spec"]["predictor"].get("model", {}).get("storageUri", ""))


def _stable(now: Json) -> str:
    return str(now["spec"]["predictor"].get("name", "the unnamed predictor"))


def _ready(now: Json) -> bool:
    seen = now.get("status", {}).get("observedGeneration", 0) >= now["metadata"].get("generation", 0)
    return bool(seen and kubernetes.conditions(now).get("Ready", {}).get("status") == "True")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the cluster refuses is the target's failure."""
    try:
        yield
    except ClusterFailed as error:
        raise TargetFailed(str(error)) from None
