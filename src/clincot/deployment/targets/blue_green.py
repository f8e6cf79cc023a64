"""Blue-green rollouts between two InferenceServices.

A front Service selects the pods of one of them. All traffic moves at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from clincot.clients import kubernetes
from clincot.clients.kubernetes import Conflict, ObjectNotFound
from clincot.deployment.inference_service import (
    DIGEST_ANNOTATION,
    GROUP,
    GRPC_PORT,
    PLURAL,
    PORT,
    SERVICE_LABEL,
    VERSION,
    Json,
    build_inference_service,
    build_labels,
)
from clincot.deployment.rollout import TargetFailed
from clincot.deployment.targets.kserve import KServeTarget, kserve_errors, read_served_digest

PREVIOUS_SELECTOR_ANNOTATION = "clincot/before"  # annotation of the front Service: its previous selector


class BlueGreenTarget(KServeTarget):
    """A rollout to a second InferenceService.

    The previous one is kept until the next rollout.
    """

    @property
    def steps(self) -> tuple[int, ...]:
        return (100,)

    @property
    def service_name(self) -> str:
        return f"{self.settings.name}-{self.revision}"

    @property
    def backend_service(self) -> str:
        """The Service in front of this revision's pods."""
        return f"{self.service_name}-{'transformer' if self.settings.transformer == 'separate' else 'predictor'}"

    def build_manifest(self) -> Json:
        manifest = build_inference_service(
            self.settings, self.digest, self.uri, name=self.service_name, mode="Standard"
        )
        manifest["spec"]["predictor"].pop("name", None)
        return manifest

    def _add_revision(self) -> str:
        with kserve_errors():
            self._note_old_events()
            front = self._read_front()
            try:
                self.cluster.create(self.build_path(self.service_name), self.build_manifest())
            except Conflict:  # from an earlier attempt of this rollout, since the name contains the digest
                return f"InferenceService {self.service_name}, there already, its settings left as they are"
        previous = "" if front is None else f" beside {front['spec']['selector'].get('app', '')}"
        return f"InferenceService {self.service_name}{previous}"

    def check_ready(self) -> bool:
        return self._check_whole_service(self._read_existing_service(self.service_name))

    @property
    def deployment_name(self) -> str:
        return f"{self.service_name}-predictor"

    @property
    def pod_selector(self) -> str:
        return f"app=isvc.{self.backend_service}"

    def post_request(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        return self._post_to_service(self.backend_service, path, payload, timeout_s)

    def post_to_endpoint(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        return self._post_to_url(path, payload, timeout_s, self.settings.name)

    def describe_traffic(self) -> str:
        with kserve_errors():
            front = self._read_front()
        if front is None:
            return f"no Service {self.settings.name} exists, so nothing gets traffic"
        app = front["spec"]["selector"].get("app", "").removeprefix("isvc.")
        ours = " (this rollout's revision)" if app == self.backend_service else ""
        return f"100 % of the traffic goes to {app}{ours}"

    def shift_traffic(self, percent: int) -> None:
        if percent != 100:
            raise TargetFailed(f"a blue-green rollout moves 100 % of the traffic at once, not {percent} %")
        ours = {"app": f"isvc.{self.backend_service}"}  # how KServe labels the pods of a component

        def select_ours(front: Json) -> Json:
            if front["spec"]["selector"] != ours:
                front["metadata"].setdefault("annotations", {})[PREVIOUS_SELECTOR_ANNOTATION] = json.dumps(
                    front["spec"]["selector"]
                )
                front["spec"]["selector"] = ours
                front["spec"]["ports"] = self._build_front_ports()
            return front

        with kserve_errors():
            if self._read_front() is None:
                self.cluster.create(self._build_front_path(), self._build_front(ours))
            else:
                self.cluster.update_with_retry(self._build_front_path(), select_ours)

    def finish_rollout(self) -> None:
        """Delete all InferenceServices of the service but the new and the previous one."""

        def mark_finished(front: Json) -> Json:
            front["metadata"].setdefault("annotations", {})[DIGEST_ANNOTATION] = self.digest
            return front

        with kserve_errors():
            front = self.cluster.update_with_retry(self._build_front_path(), mark_finished)
            kept = {f"isvc.{self.backend_service}", _read_previous_selector(front).get("app", "")}
            path = kubernetes.resource_path(GROUP, VERSION, self.settings.namespace, PLURAL)
            for service in self.cluster.get(path).get("items", ()):
                name, labels = service["metadata"]["name"], service["metadata"].get("labels", {})
                backends = {f"isvc.{name}-transformer", f"isvc.{name}-predictor"}
                if labels.get(SERVICE_LABEL) == self.settings.name and not backends & kept:
                    self.cluster.delete(self.build_path(name))

    def roll_back(self) -> None:
        ours = {"app": f"isvc.{self.backend_service}"}

        def select_previous(front: Json) -> Json:
            previous = _read_previous_selector(front)
            if front["spec"]["selector"] == ours and previous:
                front["spec"]["selector"] = previous
            return front

        with kserve_errors():
            front = self._read_front()
            if front is not None and read_served_digest(front) == self.digest:
                return  # the revision had all traffic before this rollout
            if front is not None:
                front = self.cluster.update_with_retry(self._build_front_path(), select_previous)
                if front["spec"]["selector"] == ours:  # no revision was served before
                    self.cluster.delete(self._build_front_path())
            self.cluster.delete(self.build_path(self.service_name))

    def _read_serving_object(self) -> Json | None:
        return self._read_front()

    def _read_front(self) -> Json | None:
        try:
            return self.cluster.get(self._build_front_path())
        except ObjectNotFound:
            return None

    def _build_front_path(self) -> str:
        return kubernetes.resource_path("", "v1", self.settings.namespace, "services", self.settings.name)

    def _build_front(self, selector: Json) -> Json:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": self.settings.name,
                "namespace": self.settings.namespace,
                "annotations": {},
                "labels": build_labels(self.settings),
            },
            "spec": {"selector": selector, "ports": self._build_front_ports()},
        }

    def _build_front_ports(self) -> list[Json]:
        """Ports as KServe's own Services have them."""
        ports: list[Json] = [{"name": "http", "port": 80, "targetPort": PORT}]
        return [*ports, {"name": "grpc", "port": GRPC_PORT, "targetPort": GRPC_PORT}] if self.settings.grpc else ports


def _read_previous_selector(front: Json) -> Json:
    """The front Service's previous selector; empty if it has had only one."""
    annotations = front["metadata"].get("annotations", {})
    previous: Json = json.loads(annotations.get(PREVIOUS_SELECTOR_ANNOTATION, "{}"))
    return previous
