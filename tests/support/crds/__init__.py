"""The custom resource definitions in this folder; README.md names their sources."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jsonschema import Draft202012Validator

from clincot.deployment.crd import build_validator, read_crd

_FILES = {  # kind: (file, version)
    "InferenceService": ("serving.kserve.io_inferenceservices", "v1beta1"),
    "ServingRuntime": ("serving.kserve.io_servingruntimes", "v1alpha1"),
    "ClusterStorageContainer": ("serving.kserve.io_clusterstoragecontainers", "v1alpha1"),
    "TrainJob": ("trainer.kubeflow.org_trainjobs", "v1alpha1"),
    "ScaledObject": ("keda.sh_scaledobjects", "v1alpha1"),
    "ServiceMonitor": ("monitoring.coreos.com_servicemonitors", "v1"),
    "HTTPRoute": ("gateway.networking.k8s.io_httproutes", "v1"),
    "ReferenceGrant": ("gateway.networking.k8s.io_referencegrants", "v1beta1"),
    "PrometheusRule": ("monitoring.coreos.com_prometheusrules", "v1"),
}
KINDS = frozenset(_FILES)


@cache
def load_validator(kind: str) -> Draft202012Validator:
    """Return the validator of a custom kind, which refuses unknown fields."""
    name, version = _FILES[kind]
    return build_validator(read_crd(Path(__file__).parent / f"{name}.json"), version)
