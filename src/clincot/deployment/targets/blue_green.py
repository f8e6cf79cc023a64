"""A rollout with two InferenceServices and a Service in front that selects the pods of one: all traffic at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from clincot.clients import kubernetes
from clincot.clients.kubernetes import Conflict, Missing
from clincot.deployment.inference_service import (
    DIGEST,
    GROUP,
    PLURAL,
    SERVICE,
    VERSION,
    Json,
    inference_service,
    labels,
)
from clincot.deployment.rollout import Counts, NotReady, TargetFailed
from clincot.deployment.targets.kserve import KServeTarget, is_ready, served, told

BEFORE = "clincot/before"  # annotation of the front: what it selected before


class BlueGreenTarget(KServeTarget):
    """A second InferenceService and a Service in front. The one before is kept until the next rollout."""

    @property
    def steps(self) -> tuple[int, ...]:
        return (100,)

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
        return manifest

    def start(self) -> str:
        with told():
            front = self._front()
            try:
                self.cluster.create(self.path(self.own), self.manifest())
            except Conflict:  # an attempt of ours before this one: the name holds the digest
                return f"InferenceService {self.own}, there already, its settings left as they are"
        before = "" if front is None else f" beside {front['spec']['selector'].get('app', '')}"
        return f"InferenceService {self.own}{before}"

    def check(self) -> bool:
        with told():
            now = self._read(self.own)
        if now is None:
            raise NotReady(f"InferenceService {self.own} is gone")
        return self._judge(is_ready(now), now.get("status", {}).get("modelStatus", {}), self.own)

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

        with told():
            if self._front() is None:
                self.cluster.create(self._front_path(), self._new_front(ours))
            else:
                self.cluster.change(self._front_path(), turned)

    def finish(self) -> None:
        """What served before the one before is taken away."""

        def marked(front: Json) -> Json:
            front["metadata"].setdefault("annotations", {})[DIGEST] = self.digest
            return front

        with told():
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

        with told():
            front = self._front()
            if front is not None and served(front) == self.digest:
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
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": self.settings.name,
                "namespace": self.settings.namespace,
                "annotations": {},
                "labels": labels(self.settings),
            },
            "spec": {"selector": selector, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
        }
