"""A TrainJob from its manifest to its end: started once, watched, explained where it fails, deleted when given up.

Kubeflow Trainer v2 says Complete or Failed in the job's conditions, and in `jobsStatus` how many of its pods are ready.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm

from clincot.clients import kubernetes
from clincot.clients.kubernetes import Cluster, ClusterFailed, Conflict, ObjectNotFound, get_conditions
from clincot.training.job import TrainingFailed
from clincot.training.launch_settings import TrainJobSettings

Json = dict[str, Any]
API_OUTAGE_S = 300.0  # how long the API server may not answer before we stop watching (the job goes on)
DELETE_TIMEOUT_S = 120.0  # until a deleted job's name is free again
LOG_LINES = 30
STRICT_VALIDATION = "?fieldValidation=Strict"  # a field that the cluster does not know is refused instead of dropped


def run_train_job(cluster: Cluster, manifest: Json, settings: TrainJobSettings) -> None:
    """Start the job unless it is there already, and wait until it is complete.

    A job that failed stays, to be looked at, and makes place for a new one when it is asked for again. Whoever gives up
    waiting (an interruption, SIGTERM, a time limit) deletes the job, but for an API server that does not answer: then
    the job goes on, and the next call finds it. Raises TrainingFailed, ClusterFailed.
    """
    group, version = manifest["apiVersion"].split("/")
    path = kubernetes.resource_path(
        group, version, manifest["metadata"]["namespace"], "trainjobs", manifest["metadata"]["name"]
    )
    _create_job(cluster, path, manifest, settings.poll_s)
    with _raise_on_sigterm():
        try:
            failure = _watch_job(cluster, path, settings)
        except ClusterFailed:
            raise
        except BaseException:
            cluster.delete(path)
            raise
    if failure:
        raise TrainingFailed(failure)


def _create_job(cluster: Cluster, path: str, manifest: Json, poll_s: float) -> None:
    """Create the job; one that failed makes place for a new one, any other of this name is this very work."""
    deadline = time.monotonic() + DELETE_TIMEOUT_S
    while True:
        try:
            cluster.request("POST", path.rpartition("/")[0] + STRICT_VALIDATION, manifest)
            return
        except Conflict:
            try:
                found = cluster.get(path)
            except ObjectNotFound:
                continue  # it went just now
            leaving = "deletionTimestamp" in found["metadata"]
            if not leaving and not _has_condition(found, "Failed"):
                return
            if not leaving:
                cluster.delete(path)
            if time.monotonic() > deadline:
                raise TrainingFailed(f"{path}: was deleted, but is still there after {DELETE_TIMEOUT_S:g} s") from None
            time.sleep(poll_s)


def _watch_job(cluster: Cluster, path: str, settings: TrainJobSettings) -> str:
    """Until the job is complete (""), or failed: why. Raises TrainingFailed where it is to be given up."""
    name, began, heard = path.rpartition("/")[2], time.monotonic(), time.monotonic()
    running = False
    with tqdm(desc=f"TrainJob {name}", unit=" looks", disable=None) as bar:
        while True:
            now = time.monotonic()
            try:
                job, heard = cluster.get(path), now
            except ObjectNotFound:
                raise TrainingFailed(f"TrainJob {name} was deleted by someone else while it was waited for") from None
            except ClusterFailed as error:
                if (error.status and error.status < 500 and error.status != 429) or now - heard > API_OUTAGE_S:
                    raise
                time.sleep(settings.poll_s)
                continue
            bar.update()
            if _has_condition(job, "Complete"):
                return ""
            if _has_condition(job, "Failed"):
                return f"TrainJob {name} failed: {_read_condition(job, 'Failed')}{_read_failed_log(cluster, settings, name)}"
            running = running or _is_running(job)
            if not running and now - began > settings.schedule_s:
                raise TrainingFailed(
                    f"TrainJob {name}: its {settings.nodes} nodes did not all run within {settings.schedule_s:g} s "
                    f"(schedule_s), and it was deleted: {_explain_waiting(cluster, settings, name, job)}"
                )
            if now - began > settings.timeout_s + settings.schedule_s:
                raise TrainingFailed(f"TrainJob {name} did not end within {settings.timeout_s} s and was deleted")
            time.sleep(settings.poll_s)


def _has_condition(job: Json, condition: str) -> bool:
    return get_conditions(job).get(condition, {}).get("status") == "True"


def _read_condition(job: Json, condition: str) -> str:
    found = get_conditions(job).get(condition, {})
    return f"{found.get('reason', '')}: {found.get('message', '')}"


def _is_running(job: Json) -> bool:
    """Do all nodes run (or have run)? A child job counts as ready when all of its pods are."""
    found = job.get("status", {}).get("jobsStatus") or ()
    return bool(found) and all(one.get("ready", 0) + one.get("succeeded", 0) > 0 for one in found)


def _explain_waiting(cluster: Cluster, settings: TrainJobSettings, name: str, job: Json) -> str:
    """What its pods wait for, or that it has none."""
    if _has_condition(job, "Suspended"):
        return f"it is suspended ({_read_condition(job, 'Suspended')}); is there room in the queue {settings.queue!r}?"
    reasons = []
    for pod in _list_pods(cluster, settings.namespace, name):
        scheduled = get_conditions(pod).get("PodScheduled", {})
        waiting = [
            state["waiting"]
            for one in pod.get("status", {}).get("containerStatuses", ())
            if "waiting" in (state := one.get("state", {}))
        ]
        if scheduled.get("status") == "False":
            reasons.append(str(scheduled.get("message", "it cannot be scheduled")))
        reasons += [f"{one.get('reason', '')}: {one.get('message', '')}" for one in waiting]
    return "; ".join(dict.fromkeys(reasons)) or "it has no pods; is Kubeflow Trainer's controller running?"


def _read_failed_log(cluster: Cluster, settings: TrainJobSettings, name: str) -> str:
    """The last lines of the first pod that failed; why they cannot be had, where they cannot."""
    try:
        pods = _list_pods(cluster, settings.namespace, name)
        broken = next((pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"), None)
        if broken is None:
            return f" (none of its {len(pods)} pods is there as failed)"
        called = broken["metadata"]["name"]
        at = kubernetes.resource_path("", "v1", settings.namespace, "pods", called)
        return f"; last lines of {called}:\n{cluster.request_text('GET', f'{at}/log?tailLines={LOG_LINES}')}"
    except ClusterFailed as error:
        return f" (its log cannot be read: {error})"


def _list_pods(cluster: Cluster, namespace: str, job: str) -> Sequence[Json]:
    """The pods of the job; Trainer names the JobSet after it, and JobSet labels its pods."""
    at = kubernetes.resource_path("", "v1", namespace, "pods")
    found: Sequence[Json] = cluster.get(f"{at}?labelSelector=jobset.sigs.k8s.io%2Fjobset-name%3D{job}").get("items", ())
    return found


@contextmanager
def _raise_on_sigterm() -> Iterator[None]:
    """SIGTERM (the end of a pod) as an exception, so that what was started is given up; of the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
