"""Why a pod cannot start, from its status."""

from __future__ import annotations

from typing import Any

from clincot.clients.kubernetes import Cluster, ClusterFailed, resource_path

Json = dict[str, Any]
# Reasons of a waiting container that do not pass by themselves. An image that cannot be pulled may come later.
FINAL_REASONS = ("CrashLoopBackOff", "CreateContainerConfigError", "ErrImageNeverPull", "InvalidImageName")


class PodCannotStart(ClusterFailed):
    """A container of a pod fails again and again, or cannot be created."""


def refuse_failing_pod(cluster: Cluster, namespace: str, name: str) -> None:
    """Raise PodCannotStart if a container of the pod cannot start; return if it may still do so, or does not exist.

    The account needs the permission to get the pod; without it, nothing is known and nothing is raised.
    """
    try:
        pod = cluster.get(resource_path("", "v1", namespace, "pods", name))
    except ClusterFailed:  # the caller waits for the pod in any case
        return
    if reason := explain_failing_pod(pod):
        raise PodCannotStart(f"the pod {namespace}/{name} cannot start: {reason}")


def explain_failing_pod(pod: Json) -> str:
    """Return why a container of the pod cannot start, with its last message, or ""."""
    status = pod.get("status", {})
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") not in FINAL_REASONS:
            continue
        ended = container.get("lastState", {}).get("terminated") or {}
        said = str(ended.get("message") or waiting.get("message") or "").strip()
        code = f" (exit code {ended['exitCode']})" if "exitCode" in ended else ""
        return f"container {container['name']}: {waiting['reason']}{code}: {said or 'no message'}"
    return ""
