"""What an operator says about a service on a cluster: names, sizes, accounts. Secrets are named, never held."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from clincot.config import FrozenConfig, parse_config, read_settings
from clincot.jsonl import InvalidRecord

ResourceRequirements = dict[Literal["requests", "limits"], dict[str, str]]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]


class ServiceSettings(FrozenConfig):
    """values of a service (`clincot deploy --service service.yaml`)."""

    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,36}[a-z0-9])?$", description="of the InferenceService")] = (
        "clincot"
    )
    namespace: Name = "default"
    mode: Annotated[
        Literal["auto", "standard", "knative", "blue-green"],
        Field(description="how traffic is moved; auto looks at what the cluster has"),
    ] = "auto"
    gateway_api: Annotated[
        Literal["auto", "yes", "no"],
        Field(description="does KServe route through the Gateway API? auto reads its ConfigMap, where that is allowed"),
    ] = "auto"
    kserve_namespace: Name = "kserve"
    image: Annotated[str, Field(min_length=1, description="of `clincot serve`, the transformer")] = "clincot:latest"
    engine: Annotated[
        Literal["vllm", "clincot"],
        Field(
            description="vllm: `clincot serve` in front of it; clincot: `clincot serve` alone, the model in its "
            "process, for small models without a GPU (runtime names its ServingRuntime)"
        ),
    ] = "vllm"
    transformer: Annotated[
        Literal["collocated", "separate"],
        Field(
            description="collocated: in the predictor's pod, so that both turns of a chain meet the same vLLM; "
            "separate: a component of its own, scaled apart"
        ),
    ] = "collocated"
    runtime: Annotated[str, Field(description="a (Cluster)ServingRuntime; empty: KServe picks one for vLLM")] = ""
    vllm_args: tuple[str, ...] = ()
    service_account: Annotated[str, Field(description="whose annotated Secret holds the store's keys")] = ""
    storage_container: Annotated[
        str,
        Field(description="a ClusterStorageContainer with memory enough for the checkpoint; KServe's default has 1 Gi"),
    ] = ""
    replicas: Annotated[int, Field(ge=1)] = 1
    resources: ResourceRequirements = Field(
        default={"requests": {"cpu": "4", "memory": "32Gi"}, "limits": {"memory": "32Gi", "nvidia.com/gpu": "1"}}
    )
    transformer_resources: ResourceRequirements = Field(
        default={"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "4Gi"}}
    )
    shm: Annotated[str, Field(description="size of /dev/shm")] = "8Gi"
    startup_s: Annotated[int, Field(ge=60, description="until vLLM must answer /v1/models")] = 1800
    node_selector: dict[str, str] = Field(default={})
    tolerations: tuple[dict[str, str | int], ...] = ()
    ca_config_map: Annotated[
        str, Field(description="ConfigMap with cabundle.crt (KServe's name): all CAs to trust")
    ] = ""
    proxies: dict[Literal["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"], str] = Field(
        default={}, description="without credentials"
    )
    api_keys_secret: Annotated[
        str, Field(description="Secret mounted as the server's API keys; smoke requests carry $CLINCOT_SMOKE_KEY")
    ] = ""
    service_url: Annotated[
        str,
        Field(
            description="how smoke requests reach a Service, in a pod http://{service}.{namespace}.svc.cluster.local; "
            "empty: through the API server, which needs no other address but passes no API key on"
        ),
    ] = ""

    @model_validator(mode="after")
    def _check_combination(self) -> ServiceSettings:
        if self.engine == "clincot" and not self.runtime:
            raise ValueError("engine clincot needs runtime: a ServingRuntime of `clincot serve` (the chart has one)")
        if self.engine == "clincot" and self.transformer == "separate":
            raise ValueError("engine clincot has no transformer of its own; leave transformer: collocated")
        if self.api_keys_secret and not self.service_url:
            raise ValueError("with api_keys_secret, smoke requests need service_url: the API server passes no key on")
        return self


def load_service_settings(path: Path | None) -> ServiceSettings:
    """The settings of a YAML file; raises BadRecord naming the file and the field."""
    if path is None:
        return ServiceSettings()
    content = read_settings(path, "the service's settings (service.yaml)")
    settings = parse_config(ServiceSettings, content, where=str(path))
    held = [name for name, url in settings.proxies.items() if "@" in url]
    if held:
        raise InvalidRecord(f"{path}: proxies.{held[0]} holds credentials; they would stand in manifests and records")
    return settings


def get_user_name() -> str:
    """The name that records carry: $CLINCOT_USER, or the user of this machine."""
    return os.environ.get("CLINCOT_USER") or os.environ.get("USER") or "unknown"
