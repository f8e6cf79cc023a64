"""What an operator sets for the pods of a service, with the names of Kubernetes (the block `pod` of service.yaml)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from clincot.config import FrozenConfig

Json = dict[str, Any]
# Fields of the pod's spec that are copied as they are.
_SPEC_FIELDS = (
    "nodeSelector",
    "tolerations",
    "affinity",
    "topologySpreadConstraints",
    "priorityClassName",
    "runtimeClassName",
)


class PodSettings(FrozenConfig):
    """Settings of pods. Their content is checked against the CRD of InferenceServices before it is applied."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True)

    annotations: dict[str, str] = Field(default={})
    labels: dict[str, str] = Field(default={})
    node_selector: dict[str, str] = Field(default={})
    tolerations: tuple[dict[str, str | int], ...] = ()
    affinity: Json = Field(default={})
    topology_spread_constraints: Annotated[
        tuple[Json, ...], Field(description="Constraints without a label selector spread the pods of the service.")
    ] = ()
    priority_class_name: str = ""
    runtime_class_name: str = ""
    image_pull_secrets: tuple[str, ...] = ()
    env: Annotated[tuple[Json, ...], Field(description="Environment variables of every container.")] = ()
    volumes: tuple[Json, ...] = ()
    volume_mounts: Annotated[tuple[Json, ...], Field(description="Mounts of the volumes in every container.")] = ()
    security_context: Annotated[Json, Field(description="Fields of the pod's security context.")] = Field(default={})
    container_security_context: Annotated[Json, Field(description="Fields of every container's security context.")] = (
        Field(default={})
    )

    def apply_to_spec(self, spec: Json, selector: dict[str, str]) -> Json:
        """Return a pod's spec, or a predictor or transformer, with these settings.

        selector: labels of the service's pods, for topology spread constraints without a selector.
        """
        written = self.model_dump(mode="json")
        out = spec | {name: written[name] for name in _SPEC_FIELDS if written[name]}
        if self.topology_spread_constraints:
            own = {"labelSelector": {"matchLabels": selector}}
            out["topologySpreadConstraints"] = [own | one for one in self.topology_spread_constraints]
        for name in ("labels", "annotations"):
            if written[name]:
                out[name] = written[name]
        if self.image_pull_secrets:
            out["imagePullSecrets"] = [{"name": name} for name in self.image_pull_secrets]
        if self.volumes:
            out["volumes"] = [*out.get("volumes", ()), *self.volumes]
        if self.security_context:
            out["securityContext"] = out.get("securityContext", {}) | self.security_context
        if "model" in out:
            out["model"] = self._apply_to_container(out["model"])
        if "containers" in out:
            out["containers"] = [self._apply_to_container(one) for one in out["containers"]]
        return out

    def _apply_to_container(self, container: Json) -> Json:
        out = dict(container)
        if self.env:
            out["env"] = [*out.get("env", ()), *self.env]
        if self.volume_mounts:
            out["volumeMounts"] = [*out.get("volumeMounts", ()), *self.volume_mounts]
        if self.container_security_context:
            out["securityContext"] = out.get("securityContext", {}) | self.container_security_context
        return out
