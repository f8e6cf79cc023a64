"""Settings of a service on a cluster.

They name Secrets and never contain credentials.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from clincot.config import FrozenConfig, ServeConfig, parse_config, read_settings
from clincot.config.server_settings import ServeSettings
from clincot.deployment.pod_settings import PodSettings
from clincot.jsonl import InvalidRecord

ResourceRequirements = dict[Literal["requests", "limits"], dict[str, str]]
UNKNOWN_USER = "unknown"
MEASURED_SETTINGS = ("propose", "max_new_tokens")  # of the server; they decide the answers that the gate measured
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]


class OwningRelease(FrozenConfig):
    """The Helm release that owns a service, and the object that says what the release calls it now."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,51}[a-z0-9])?$")]
    config_map: Annotated[
        Name, Field(description="ConfigMap of the release, whose service.yaml has the service's present name.")
    ]


class ServiceSettings(FrozenConfig):
    """Settings of a service (`clincot deploy --service service.yaml`)."""

    name: Annotated[
        str, Field(pattern=r"^[a-z]([-a-z0-9]{0,36}[a-z0-9])?$", description="Name of the InferenceService.")
    ] = "clincot"
    namespace: Name = "default"
    instance: Annotated[
        str,
        Field(description="Release whose network policies and monitors select the service; empty: none."),
    ] = ""
    release: Annotated[
        OwningRelease | None,
        Field(
            description="Release that owns the service, and no other one: a rollout removes the services that it made "
            "under other names, once this one has all traffic. Without it, nothing is removed.",
            exclude_if=lambda value: value is None,
        ),
    ] = None
    mode: Annotated[
        Literal["auto", "standard", "knative", "blue-green"],
        Field(description="How traffic is moved; auto chooses by what the cluster supports."),
    ] = "auto"
    gateway_api: Annotated[
        Literal["auto", "yes", "no"],
        Field(
            description="Whether KServe routes through the Gateway API; auto reads its ConfigMap, if that is allowed."
        ),
    ] = "auto"
    kserve_namespace: Name = "kserve"
    image: Annotated[str, Field(min_length=1, description="Image of `clincot serve`.")] = "clincot:latest"
    engine: Annotated[
        Literal["vllm", "clincot"],
        Field(
            description="vllm: vLLM runs the model, with `clincot serve` in front of it. clincot: `clincot serve` runs "
            "the model in its own process, for small models without a GPU; runtime names its ServingRuntime."
        ),
    ] = "vllm"
    transformer: Annotated[
        Literal["collocated", "separate"],
        Field(
            description="collocated: `clincot serve` runs in the predictor's pod, so that both turns of a chain reach "
            "the same vLLM. separate: it is a component of its own, which scales independently."
        ),
    ] = "collocated"
    runtime: Annotated[str, Field(description="A (Cluster)ServingRuntime; if empty, KServe chooses one for vLLM.")] = ""
    vllm_args: tuple[str, ...] = ()
    service_account: Annotated[
        str, Field(description="ServiceAccount whose annotated Secret contains the store's keys.")
    ] = ""
    storage_container: Annotated[
        str,
        Field(
            description="A ClusterStorageContainer with enough memory for the checkpoint; KServe's default has 1 Gi."
        ),
    ] = ""
    listen: Annotated[
        Literal["0.0.0.0", "::"], Field(description="Address on which servers listen; :: in clusters with IPv6 only.")
    ] = "0.0.0.0"
    grpc: Annotated[
        bool,
        Field(
            description="Whether the Services of the pods have port 8081 for the V2 protocol over gRPC, too.",
            exclude_if=lambda value: not value,  # settings of versions without this field keep their digests
        ),
    ] = False
    replicas: Annotated[int, Field(ge=1)] = 1
    resources: ResourceRequirements = Field(
        default={"requests": {"cpu": "4", "memory": "32Gi"}, "limits": {"memory": "32Gi", "nvidia.com/gpu": "1"}}
    )
    transformer_resources: ResourceRequirements = Field(
        default={"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "4Gi"}}
    )
    shm: Annotated[str, Field(description="Size of /dev/shm.")] = "8Gi"
    startup_s: Annotated[int, Field(ge=60, description="Seconds within which vLLM must answer /v1/models.")] = 1800
    drain_s: Annotated[
        int, Field(ge=0, description="Seconds that a pod still answers new requests after its deletion has begun.")
    ] = 5
    grace_s: Annotated[
        int, Field(ge=1, description="Seconds for accepted requests to finish after that; at least deadline_s.")
    ] = 75
    pod: Annotated[PodSettings, Field(description="Placement, environment, volumes and security of the pods.")] = (
        PodSettings()
    )
    ca_config_map: Annotated[
        str, Field(description="ConfigMap with all trusted CAs in cabundle.crt (KServe's file name).")
    ] = ""
    proxies: dict[Literal["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"], str] = Field(
        default={}, description="Proxies as environment variables, without credentials."
    )
    api_keys_secret: Annotated[
        str,
        Field(description="Secret that is mounted as the server's API keys; smoke requests send $CLINCOT_SMOKE_KEY."),
    ] = ""
    service_url: Annotated[
        str,
        Field(
            description="Address of a Service for smoke requests; from a pod it is "
            "http://{service}.{namespace}.svc.cluster.local. If empty, they go through the API server, which needs no "
            "other address but does not forward API keys."
        ),
    ] = ""

    pod_metrics_url: Annotated[
        str,
        Field(
            description="Address of one pod's metrics, which the watch of a rollout reads, with {pod_ip}, {pod} and "
            "{namespace} in it. If empty: http://{pod_ip}:8080/metrics with service_url, else through the API server."
        ),
    ] = ""
    endpoint_url: Annotated[
        str,
        Field(
            description="Address that users' clients call, such as https://clincot.hospital.example, through which a "
            "rollout asks its last questions. If empty: the Service that gets the traffic."
        ),
    ] = ""
    serve: dict[str, Any] = Field(
        default={},
        description="Settings of the server (config/server_settings.py), such as abstain_below or running. What "
        "decides the answers (propose, max_new_tokens) is taken from the published checkpoint, as it was measured.",
    )

    @property
    def traces_endpoint(self) -> str:
        """The collector that gets traces; "" without one."""
        return str(self.serve.get("traces_endpoint", ""))

    def with_measured(self, serve: ServeConfig | None) -> ServiceSettings:
        """The settings with those that a checkpoint was measured with; None: it was published without any."""
        measured = {} if serve is None else serve.model_dump(mode="json")
        return self.model_copy(update={"serve": measured | self.serve})

    def list_serve_arguments(self) -> list[str]:
        """`serve` as arguments of `clincot serve`; JSON is also YAML, which --set reads.

        KServe fills in `{{…}}` and Kubernetes `$(…)` in arguments, so texts with these are written with escapes.
        """
        arguments = []
        for name, value in self.serve.items():
            text = json.dumps(value).replace("{{", "{\\u007b").replace("$(", "\\u0024(")
            arguments.append(f"--set={name}={text}")
        return arguments

    @model_validator(mode="after")
    def _check_serve_settings(self) -> ServiceSettings:
        measured = [name for name in MEASURED_SETTINGS if name in self.serve]
        if measured:
            raise ValueError(
                f"serve.{measured[0]} decides the answers, so a deployment cannot change it; set it in the section "
                "serve of the round's parameters, where the gate measures it"
            )
        if "grace_s" in self.serve:
            raise ValueError(
                "serve.grace_s has to fit the time that Kubernetes gives the pod; set grace_s, which sets both"
            )
        server = ServeSettings.model_validate(self.serve)
        if server.deadline_s > self.grace_s:
            raise ValueError(
                f"grace_s is {self.grace_s}, but a request may take serve.deadline_s, which is {server.deadline_s:g} "
                "seconds; a pod that ends would cut it off, so expected grace_s to be at least as long"
            )
        return self

    @model_validator(mode="after")
    def _check_combination(self) -> ServiceSettings:
        if self.engine == "clincot" and not self.runtime:
            raise ValueError("engine clincot needs runtime: a ServingRuntime of `clincot serve` (the chart has one)")
        if self.engine == "clincot" and self.transformer == "separate":
            raise ValueError("engine clincot has no separate transformer; set transformer: collocated")
        if self.api_keys_secret and not self.service_url:
            raise ValueError("api_keys_secret needs service_url for smoke requests: the API server forwards no key")
        return self


def load_service_settings(path: Path | None) -> ServiceSettings:
    """Read the settings from a YAML file; the defaults without one.

    Raises InvalidRecord naming the file and the field.
    """
    if path is None:
        return ServiceSettings()
    content = read_settings(path, "the service's settings (service.yaml)")
    settings = parse_config(ServiceSettings, content, where=str(path))
    with_credentials = [name for name, url in settings.proxies.items() if "@" in url]
    if with_credentials:
        raise InvalidRecord(
            f"{path}: proxies.{with_credentials[0]} contains credentials; expected none, because manifests and records "
            "contain the proxies"
        )
    return settings


def get_user_name() -> str:
    """The user name for records: $CLINCOT_USER, or $USER."""
    return os.environ.get("CLINCOT_USER") or os.environ.get("USER") or UNKNOWN_USER
