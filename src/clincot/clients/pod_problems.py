"""Why pods do not come up, as Kubernetes says it: events of their ReplicaSet, their conditions, their containers.

A problem is permanent if waiting cannot mend it: the same pod would fail again until somebody changes its manifest, its
image or its node's policy. The reasons are those of Kubernetes 1.34: pkg/kubelet/images/types.go (images),
pkg/kubelet/kuberuntime (containers), pkg/controller/replicaset (FailedCreate), the scheduler (Unschedulable).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

from clincot.clients.kubernetes import Cluster, ClusterFailed, Forbidden, get_conditions, resource_path

Json = dict[str, Any]
INITIALIZER = "storage-initializer"  # KServe's init container, which downloads the checkpoint
_LOG_LINES, _LOG_CHARS, _MESSAGE_CHARS = 8, 600, 600
_PERMANENT_WAITING = frozenset({"InvalidImageName", "ErrImageNeverPull"})
_IMAGE_WAITING = frozenset({"ErrImagePull", "ImagePullBackOff"})
# What registries answer if an image does not exist or may not be pulled; anything else may be an outage.
_PERMANENT_PULL_ERRORS = ("not found", "manifest unknown", "unauthorized", "denied", "does not exist")
_ALLOWED_RESTARTS = 2  # of a container that exits by itself; a store that is away for a moment is no reason to give up


class PodProblem(NamedTuple):
    """A reason that Kubernetes gives, and whether waiting is pointless."""

    text: str
    permanent: bool


def list_pods(cluster: Cluster, namespace: str, selector: str) -> list[Json]:
    """The pods with these labels (`key=value,…`). Raises ClusterFailed."""
    path = resource_path("", "v1", namespace, "pods")
    pods: list[Json] = cluster.get(f"{path}?labelSelector={quote(selector, safe='')}").get("items") or []
    return pods


def list_creation_events(cluster: Cluster, namespace: str, owner: str) -> dict[str, str]:
    """The events that pods could not be created: {identity: message}.

    owner: name of the Deployment. An event stays for an hour and is counted up when it happens again, so its identity
    contains the count. Raises ClusterFailed.
    """
    path = resource_path("", "v1", namespace, "events")
    events = cluster.get(f"{path}?fieldSelector={quote('reason=FailedCreate', safe='')}").get("items") or []
    found = {}
    for event in events:
        involved, metadata = event.get("involvedObject", {}), event.get("metadata", {})
        if involved.get("kind") == "ReplicaSet" and str(involved.get("name", "")).startswith(f"{owner}-"):
            identity = f"{metadata.get('uid', '')} {event.get('count', 1)} {event.get('lastTimestamp', '')}"
            found[identity] = str(event.get("message", ""))
    return found


def find_pod_problems(
    cluster: Cluster, namespace: str, selector: str, owner: str, *, old_events: Collection[str] = ()
) -> list[PodProblem]:
    """Why the pods with these labels are not ready; permanent problems first, each text once.

    owner: name of the Deployment, with which the names of its ReplicaSets and pods begin. Without the permission to
    read pods or events, that is the only problem. old_events: identities of events before the pods' manifest was
    written. Raises ClusterFailed if the API server does not answer.
    """
    try:
        pods = [pod for pod in list_pods(cluster, namespace, selector) if "deletionTimestamp" not in pod["metadata"]]
        problems: list[PodProblem] = []
        if not pods:
            for identity, message in list_creation_events(cluster, namespace, owner).items():
                if identity not in old_events:
                    problems.append(_read_creation_problem(message))
        for pod in pods:
            problems += _read_pod(cluster, namespace, pod)
    except Forbidden as error:
        return [PodProblem(f"Kubernetes' reasons cannot be read: {error}", permanent=False)]
    return sorted(dict.fromkeys(problems), key=lambda problem: not problem.permanent)


def count_ready_pods(pods: Iterable[Json]) -> int:
    """How many of the pods are ready."""
    return sum(get_conditions(pod).get("Ready", {}).get("status") == "True" for pod in pods)


def _read_creation_problem(message: str) -> PodProblem:
    # "exceeded quota" passes when another pod ends; PodSecurity and admission refuse every pod alike
    permanent = "is forbidden" in message and "exceeded quota" not in message
    return PodProblem(f"FailedCreate: {_without_pod_name(message)[:_MESSAGE_CHARS]}", permanent)


def _without_pod_name(message: str) -> str:
    """Every attempt has a pod name of its own; without it, equal messages are equal."""
    before, quote_mark, rest = message.partition('pods "')
    return before + "pods" + rest.partition('"')[2] if quote_mark else message


def _read_pod(cluster: Cluster, namespace: str, pod: Json) -> Iterator[PodProblem]:
    status = pod.get("status", {})
    scheduled = get_conditions(pod).get("PodScheduled", {})
    if scheduled.get("status") == "False":
        yield PodProblem(f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}", permanent=False)
    if status.get("phase") == "Failed" and status.get("reason"):
        yield PodProblem(f"{status['reason']}: {status.get('message', '')}", permanent=False)  # evicted: replaced
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        yield from _read_container(cluster, namespace, pod["metadata"]["name"], container)


def _read_container(cluster: Cluster, namespace: str, pod: str, container: Json) -> Iterator[PodProblem]:
    name, state = container.get("name", ""), container.get("state", {})
    waiting = state.get("waiting") or {}
    reason, message = str(waiting.get("reason", "")), str(waiting.get("message", ""))
    ended = state.get("terminated") or container.get("lastState", {}).get("terminated") or {}
    if reason in _PERMANENT_WAITING:
        yield PodProblem(f"container {name}: {reason}: {message[:_MESSAGE_CHARS]}", permanent=True)
    elif reason in _IMAGE_WAITING:
        permanent = any(words in message.casefold() for words in _PERMANENT_PULL_ERRORS)
        yield PodProblem(f"container {name}: {reason}: {message[:_MESSAGE_CHARS]}", permanent)
    elif reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        yield PodProblem(f"container {name}: {reason}: {message[:_MESSAGE_CHARS]}", permanent=False)
    if ended.get("reason") == "OOMKilled":
        yield PodProblem(f"container {name}: OOMKilled: it needs more memory than its limit", permanent=True)
    elif ended and ended.get("exitCode", 0) != 0:
        end = ended.get("message") or _read_log_end(cluster, namespace, pod, name)
        text = f"container {name}: exit code {ended['exitCode']}" + (f": {end.strip()[-_LOG_CHARS:]}" if end else "")
        yield PodProblem(text, permanent=container.get("restartCount", 0) > _ALLOWED_RESTARTS)


def _read_log_end(cluster: Cluster, namespace: str, pod: str, container: str) -> str:
    """The last lines of the container that ended; empty if they cannot be read."""
    path = resource_path("", "v1", namespace, "pods", pod)
    for which in ("true", "false"):  # of the container before the restart, or of one that was not restarted
        try:
            query = f"container={container}&previous={which}&tailLines={_LOG_LINES}"
            text = cluster.request_text("GET", f"{path}/log?{query}")
        except ClusterFailed:
            continue
        if text.strip():
            return text
    return ""
