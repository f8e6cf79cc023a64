"""Run a TrainJob: create it once, watch it, explain its failure, and delete it if the caller gives up.

Kubeflow Trainer v2 reports Complete or Failed in the job's conditions, and in `jobsStatus` the number of ready pods.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from clincot.clients import kubernetes
from clincot.clients.kubernetes import Cluster, ClusterFailed, Conflict, ObjectNotFound, get_conditions
from clincot.processes import exit_on_sigterm
from clincot.training.job import TrainingFailed
from clincot.training.launch_settings import TrainJobSettings

Json = dict[str, Any]
DELETE_TIMEOUT_S = 120.0  # longest time until the name of a deleted job is free again
LOG_LINES = 30
STRICT_VALIDATION = "?fieldValidation=Strict"  # refuse fields that the cluster does not know instead of dropping them


def run_train_job(cluster: Cluster, manifest: Json, settings: TrainJobSettings) -> None:
    """Create the job unless it exists, and wait until it is complete.

    A failed job is kept for inspection and replaced by the next call. If waiting is interrupted (by an exception,
    SIGTERM or a time limit), the job is deleted. If the API server does not answer, the job keeps running and the next
    call finds it. Raises TrainingFailed, ClusterFailed.
    """
    group, version = manifest["apiVersion"].split("/")
    path = kubernetes.resource_path(
        group, version, manifest["metadata"]["namespace"], "trainjobs", manifest["metadata"]["name"]
    )
    _create_job(cluster, path, manifest, settings.poll_s)
    with exit_on_sigterm():  # a pod's end, so that the job is deleted
        try:
            failure = _watch_job(cluster, path, settings)
        except ClusterFailed:  # the job may be running well, and deleting it would fail in the same way
            raise
        except BaseException:
            cluster.delete(path)
            raise
    if failure:
        raise TrainingFailed(failure)


def _create_job(cluster: Cluster, path: str, manifest: Json, poll_s: float) -> None:
    """Create the job, replacing a failed one of this name; any other job of this name has the same content."""
    deadline = time.monotonic() + DELETE_TIMEOUT_S
    while True:
        try:
            cluster.request("POST", path.rpartition("/")[0] + STRICT_VALIDATION, manifest)
            return
        except Conflict:
            try:
                existing = cluster.get(path)
            except ObjectNotFound:
                continue  # deleted between the two requests
            deleting = "deletionTimestamp" in existing["metadata"]
            if not deleting and not _has_condition(existing, "Failed"):
                return
            if not deleting:
                cluster.delete(path)
            if time.monotonic() > deadline:
                raise TrainingFailed(f"{path}: was deleted, but still exists after {DELETE_TIMEOUT_S:g} s") from None
            time.sleep(poll_s)


def _watch_job(cluster: Cluster, path: str, settings: TrainJobSettings) -> str:
    """Wait for the job to end; return "" if it is complete, or the reason if it failed.

    Raises TrainingFailed if it exceeds a time limit or was deleted, and ClusterFailed for a refused request or an
    outage of the API server that outlasts the wait for it.
    """
    name, start = path.rpartition("/")[2], time.monotonic()
    running = False
    with tqdm(desc=f"TrainJob {name}", unit=" polls", disable=None) as bar:
        while True:
            try:
                job = cluster.get(path)
            except ObjectNotFound:
                raise TrainingFailed(f"TrainJob {name} was deleted by someone else while it was running") from None
            now = time.monotonic()
            bar.update()
            if _has_condition(job, "Complete"):
                return ""
            if _has_condition(job, "Failed"):
                log = _read_failed_log(cluster, settings, name)
                return f"TrainJob {name} failed: {_read_condition(job, 'Failed')}{log}"
            running = running or _is_running(job)
            if not running and now - start > settings.schedule_s:
                raise TrainingFailed(
                    f"TrainJob {name}: its {settings.nodes} nodes did not all run within {settings.schedule_s:g} s "
                    f"(schedule_s), and it was deleted: {_explain_waiting(cluster, settings, name, job)}"
                )
            if now - start > settings.timeout_s + settings.schedule_s:
                raise TrainingFailed(f"TrainJob {name} did not end within {settings.timeout_s} s and was deleted")
            time.sleep(settings.poll_s)


def _has_condition(job: Json, condition: str) -> bool:
    return get_conditions(job).get(condition, {}).get("status") == "True"


def _read_condition(job: Json, condition: str) -> str:
    content = get_conditions(job).get(condition, {})
    return f"{content.get('reason', '')}: {content.get('message', '')}"


def _is_running(job: Json) -> bool:
    """Whether all nodes run or have run; a child job counts as ready when all of its pods are."""
    child_jobs = job.get("status", {}).get("jobsStatus") or ()
    return bool(child_jobs) and all(child.get("ready", 0) + child.get("succeeded", 0) > 0 for child in child_jobs)


def _explain_waiting(cluster: Cluster, settings: TrainJobSettings, name: str, job: Json) -> str:
    """What the job's pods are waiting for, or that it has none."""
    if _has_condition(job, "Suspended"):
        return (
            f"it is suspended ({_read_condition(job, 'Suspended')}); does the queue {settings.queue!r} have enough "
            "free quota?"
        )
    reasons = []
    for pod in _list_pods(cluster, settings.namespace, name):
        scheduled = get_conditions(pod).get("PodScheduled", {})
        if scheduled.get("status") == "False":
            reasons.append(str(scheduled.get("message", "it cannot be scheduled")))
        for container in pod.get("status", {}).get("containerStatuses", ()):
            waiting = container.get("state", {}).get("waiting")
            if waiting is not None:
                reasons.append(f"{waiting.get('reason', '')}: {waiting.get('message', '')}")
    return "; ".join(dict.fromkeys(reasons)) or "it has no pods; is Kubeflow Trainer's controller running?"


def _read_failed_log(cluster: Cluster, settings: TrainJobSettings, name: str) -> str:
    """The last log lines of the first pod that failed, or the reason why they are not available."""
    try:
        pods = _list_pods(cluster, settings.namespace, name)
        failed = next((pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"), None)
        if failed is None:
            return f" (none of its {len(pods)} pods has failed)"
        pod_name = failed["metadata"]["name"]
        path = kubernetes.resource_path("", "v1", settings.namespace, "pods", pod_name)
        return f"; last lines of {pod_name}:\n{cluster.request_text('GET', f'{path}/log?tailLines={LOG_LINES}')}"
    except ClusterFailed as error:
        return f" (its log cannot be read: {error})"


def _list_pods(cluster: Cluster, namespace: str, job: str) -> Sequence[Json]:
    """The pods of the job: Trainer gives the JobSet the job's name, and JobSet labels its pods with it."""
    path = kubernetes.resource_path("", "v1", namespace, "pods")
    reply = cluster.get(f"{path}?labelSelector=jobset.sigs.k8s.io%2Fjobset-name%3D{job}")
    pods: Sequence[Json] = reply.get("items", ())
    return pods
