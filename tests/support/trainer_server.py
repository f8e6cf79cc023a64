"""Kubeflow Trainer's controller on the stub of the API server: what becomes of TrainJobs is scripted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.kube_api_server import ApiServer, Json
from tests.support.trainer_webhook import TORCH_DISTRIBUTED, deny_train_job

GROUPS = {"trainer.kubeflow.org/v1alpha1"}


def condition(kind: str, reason: str, message: str) -> Json:
    return {
        "type": kind,
        "status": "True",
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }


@dataclass
class TrainerServer(ApiServer):
    """Each job runs from the second look on and ends at `ends_after`; `work` is what its pods do."""

    groups: set[str] = field(default_factory=lambda: set(GROUPS))
    runtimes: frozenset[tuple[str, str]] = frozenset({TORCH_DISTRIBUTED})  # (kind, name) of what is installed
    runs: bool = True  # False: its pods stay pending
    suspended: bool = False
    fails: str = ""  # why, in the job's condition
    ends_after: int = 3
    work: Callable[[Json], None] | None = None
    logs: dict[str, str] = field(default_factory=dict)  # {pod: its log}
    pods: list[Json] = field(default_factory=list)
    looks: int = 0
    created: int = 0

    def handle(self, method: str, path: str, body: Json | None, query: str = "") -> tuple[int, Json | str]:
        parts = path.split("/")
        if any(method == m and part in path for m, part in self.forbidden):
            return super().handle(method, path, body, query)
        if method == "GET" and parts[-1] == "pods":
            self.requests.append((method, f"{path}?{query}"))
            return 200, {"items": self.pods}
        if method == "GET" and parts[-1] == "log":
            return (200, self.logs[parts[-2]]) if parts[-2] in self.logs else (404, {"message": "no such pod"})
        if method == "POST" and parts[-1] == "trainjobs" and (denial := deny_train_job(body or {}, self.runtimes)):
            self.requests.append((method, path))
            return 403, {"message": denial, "reason": "Forbidden", "code": 403}
        if method == "POST" and parts[-1] == "trainjobs" and "dryRun" not in query:
            self.created += 1
            self.looks = 0
        return super().handle(method, path, body, query)

    def _reconcile(self, thing: Json) -> None:
        if thing.get("kind") != "TrainJob":
            super()._reconcile(thing)
            return
        self.looks += 1
        status = thing.setdefault("status", {})
        if self.suspended:
            status["conditions"] = [condition("Suspended", "Suspended", "the queue clinic has no quota left")]
            return
        counts = {"active": 1, "failed": 0, "suspended": 0, "succeeded": 0}
        status["jobsStatus"] = [{"name": "node", "ready": int(self.runs), **counts}]
        if not self.runs or self.looks < self.ends_after:
            return
        if self.fails:
            status["conditions"] = [condition("Failed", "JobsFailed", self.fails)]
            return
        if self.work is not None:
            self.work(thing)
        status["conditions"] = [condition("Complete", "JobsCompleted", "done")]


def pod(name: str, phase: str, *, unschedulable: str = "", waiting: str = "") -> Json:
    conditions = [{"type": "PodScheduled", "status": "False", "message": unschedulable}] if unschedulable else []
    states = [{"name": "node", "state": {"waiting": {"reason": "ImagePullBackOff", "message": waiting}}}]
    return {
        "metadata": {"name": name},
        "status": {"phase": phase, "conditions": conditions, "containerStatuses": states if waiting else []},
    }
