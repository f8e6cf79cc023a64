"""What Kubeflow Pipelines makes of a compiled pipeline in Argo's Workflow, as far as names and settings go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_kubernetes_configs(platform: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {label of an executor: its settings for Kubernetes} of a platform spec; {} if it has none."""
    kubernetes = platform.get("platforms", {}).get("kubernetes", {})
    configs: dict[str, dict[str, Any]] = kubernetes.get("deploymentSpec", {}).get("executors", {})
    return configs


def name_executor_template(task: Mapping[str, Any], kubernetes: Mapping[str, Any]) -> str:
    """Return the name of Argo's template for the pods of a task, which is part of their names.

    task: as in the pipeline spec. kubernetes: the settings of its executor. kubeflow/pipelines 2.17.0,
    backend/src/v2/compiler/argocompiler/container.go: addContainerExecutorTemplate.
    """
    name = "retry-system-container-impl" if "retryPolicy" in task else "system-container-impl"
    metadata = kubernetes.get("podMetadata")
    if metadata is None:
        return name
    return f"metadata-{len(metadata.get('annotations', {}))}-{len(metadata.get('labels', {}))}-{name}"
