"""The tasks of a run, as a person knows them, from the record that Kubeflow Pipelines keeps of its workflow.

The record has an entry for each node of Argo's workflow: drivers, executors, attempts, loops, and the tasks themselves,
under the keys of the compiled pipeline. There is no order, and no entry says which other one it belongs to, except that
an entry lists the ids of its child nodes. Entries that the launcher reports have no name. (kubeflow/pipelines 2.17.0,
backend/src/apiserver/server/api_converter.go: toModelTasks, toApiPipelineTaskDetail.)

A record may stop early: an Argo workflow above 1 MB keeps its nodes compressed, and Kubeflow Pipelines then records no
further nodes. The tasks that it saw last stay RUNNING for ever, also after the run has ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from clincot.pipelines.argo_workflow import name_executor_template, read_kubernetes_configs

TERMINAL_STATES = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED", "CANCELLED")
_ROUND_KEY = re.compile(r"round-\d+")
_ORDER = ("failed", "stopped", "running", "waiting", "not recorded", "succeeded", "cached", "skipped", "not reached")

_STATES = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "SKIPPED": "skipped",
    "CANCELED": "stopped",
    "CANCELLED": "stopped",
}


@dataclass(frozen=True)
class PlannedTask:
    """A task of the compiled pipeline, with the pipelines around it, outermost first."""

    key: str  # name of Argo's node
    label: str  # name in the graph of the UI
    around: tuple[str, ...] = ()
    iterated: bool = False
    template: str = ""  # Argo's template of the pod, part of the pod's name


@dataclass(frozen=True)
class TaskRow:
    """State and times of a task; of all of them together for a task that runs once for each shard."""

    task: PlannedTask
    label: str
    state: str  # one of _ORDER
    count: int = 1
    started: datetime | None = None
    ended: datetime | None = None
    nodes: tuple[str, ...] = ()  # ids of Argo's nodes whose logs tell why the task failed, the last attempt first


@dataclass(frozen=True)
class RunRecord:
    """What the server knows of a run."""

    state: str
    rows: tuple[TaskRow, ...]
    terminated: bool  # somebody terminated it
    incomplete: bool  # the run has ended, but the record stops before
    started: datetime | None
    ended: datetime | None

    @property
    def failed_rows(self) -> list[TaskRow]:
        return [row for row in self.rows if row.state == "failed"]


class _RunFacts(NamedTuple):
    """What is known of a run as a whole."""

    over: bool
    terminated: bool
    incomplete: bool


@dataclass
class _Entries:
    """The named entries of a record, by name."""

    by_name: dict[str, list[Any]] = field(default_factory=dict)

    def find(self, name: str) -> list[Any]:
        return self.by_name.get(name, [])


def read_run_record(run: Any, spec: Any) -> RunRecord:
    """Return the record of a run, its tasks in time order.

    run: as the API returns it. spec: its compiled pipeline, as the API returns that of a run or of a version.
    """
    details = (run.run_details.task_details or []) if run.run_details is not None else []
    entries = _Entries()
    for entry in details:
        if entry.display_name:
            entries.by_name.setdefault(entry.display_name, []).append(entry)
    state = str(run.state or "PENDING")
    over = state in TERMINAL_STATES
    terminated = any(one.state == "CANCELING" for one in run.state_history or [])
    incomplete = over and any(_is_open(entry) for entry in details)
    facts = _RunFacts(over, terminated, incomplete)
    rows = [_build_row(task, entries, facts) for task in list_planned_tasks(spec)]
    rows.sort(key=_sort_key)  # stable: tasks without a time stay in the order of the pipeline, after the others
    return RunRecord(
        state, tuple(rows), terminated, incomplete, _parse_time(run.created_at), _parse_time(run.finished_at)
    )


def list_planned_tasks(spec: Any) -> list[PlannedTask]:
    """Return the tasks of a compiled pipeline that run in pods, each after those it depends on."""
    if not isinstance(spec, Mapping):
        return []
    pipeline = spec.get("pipeline_spec", spec)
    executors = read_kubernetes_configs(spec.get("platform_spec") or {})
    return list(_iter_tasks(pipeline, executors, pipeline.get("root", {}), (), iterated=False))


def _iter_tasks(
    pipeline: Mapping[str, Any],
    executors: Mapping[str, Any],
    component: Any,
    around: tuple[str, ...],
    *,
    iterated: bool,
) -> Iterator[PlannedTask]:
    tasks = component.get("dag", {}).get("tasks", {})
    for key in _order_tasks(tasks):
        task = tasks[key]
        inside = pipeline.get("components", {}).get(task["componentRef"]["name"], {})
        label = task.get("taskInfo", {}).get("name", key)
        if "dag" in inside:
            repeated = iterated or "parameterIterator" in task or "artifactIterator" in task
            yield from _iter_tasks(pipeline, executors, inside, (*around, key), iterated=repeated)
        else:
            settings = executors.get(inside.get("executorLabel", ""), {})
            yield PlannedTask(key, label, around, iterated, name_executor_template(task, settings))


def _order_tasks(tasks: Mapping[str, Any]) -> list[str]:
    """Return the keys so that each follows what it depends on."""
    ordered: list[str] = []
    left = sorted(tasks)
    while left:
        ready = [key for key in left if set(tasks[key].get("dependentTasks", ())) <= set(ordered)] or left
        ordered += ready
        left = [key for key in left if key not in ready]
    return ordered


def _build_row(task: PlannedTask, entries: _Entries, run: _RunFacts) -> TaskRow:
    """Return the row of a task. If the run does several rounds, each round's task is one of its own."""
    found, drivers, label = entries.find(task.key), entries.find(f"{task.key}-driver"), task.label
    window = next((key for key in task.around if _ROUND_KEY.fullmatch(key)), "")
    if window:
        label = f"{window.replace('-', ' ')}: {label}"
        found, drivers = _within(found, entries.find(window)), _within(drivers, entries.find(window))
    shown = found or drivers
    if not shown:
        return TaskRow(task, label, _name_missing(task, entries, run))
    states, nodes = [], []
    for entry in shown:
        states.append(_name_state(entry, drivers, run))
        if states[-1] == "failed":
            nodes += _find_nodes(entry, task, entries)
    reached = [entry for entry in shown if entry.state] or [driver for driver in drivers if driver.state]
    started = [time for entry in reached if (time := _parse_time(entry.start_time))]
    ended = [time for entry in reached if (time := _parse_time(entry.end_time))]
    return TaskRow(
        task,
        label,
        state=min(states, key=_ORDER.index),
        count=len(shown) if task.iterated else 1,
        started=min(started, default=None),
        ended=max(ended) if ended and len(ended) == len(reached) else None,
        nodes=tuple(nodes),
    )


def _within(found: Sequence[Any], windows: Sequence[Any]) -> list[Any]:
    """Return the entries that began while one of the others ran."""
    kept = []
    for entry in found:
        start = _parse_time(entry.start_time)
        for window in windows:
            begin, end = _parse_time(window.start_time), _parse_time(window.end_time)
            if start and begin and begin <= start and (end is None or start <= end):
                kept.append(entry)
                break
    return kept


def _name_state(entry: Any, drivers: Sequence[Any], run: _RunFacts) -> str:
    """Return the state of a task's entry in words."""
    failed = "stopped" if run.terminated else "failed"
    if not entry.state:  # Argo omitted it, because a task before it failed, or its own driver did
        return failed if any(driver.state == "FAILED" for driver in drivers) else "not reached"
    if _is_open(entry):
        return "not recorded" if run.over else _STATES[entry.state]
    if entry.state == "SUCCEEDED" and entry.start_time == entry.end_time:
        return "cached"  # the executor of a task whose result comes from the cache is skipped, which takes no time
    return failed if entry.state == "FAILED" else _STATES.get(entry.state, "waiting")


def _name_missing(task: PlannedTask, entries: _Entries, run: _RunFacts) -> str:
    """Return the state of a task without an entry in words."""
    for key in task.around:
        if any(entry.state == "SKIPPED" for entry in entries.find(key)):
            return "skipped"
    if not run.over:
        return "waiting"
    return "not recorded" if run.incomplete else "not reached"


def _find_nodes(entry: Any, task: PlannedTask, entries: _Entries) -> list[str]:
    """Return the ids of the nodes that may hold the log of a failed task, the last attempt first."""
    begin, end = _parse_time(entry.start_time), _parse_time(entry.end_time)
    nodes: list[str] = []
    for executor in entries.find("executor"):
        start = _parse_time(executor.start_time)
        if executor.state == "FAILED" and begin and end and start and begin <= start <= end:
            nodes += [child.pod_name for child in reversed(executor.child_tasks or [])]
    for parent in (*entries.find(f"{task.key}(0)"), entry):  # without retries, the pod is a child of the task itself
        if parent.start_time and _parse_time(parent.start_time) == begin:
            nodes += [child.pod_name for child in parent.child_tasks or []]
    return list(dict.fromkeys(nodes))


def _is_open(entry: Any) -> bool:
    return entry.state in ("PENDING", "RUNNING")


def _sort_key(row: TaskRow) -> tuple[bool, float]:
    return (row.started is None, row.started.timestamp() if row.started else 0.0)


def _parse_time(value: Any) -> datetime | None:
    """Return a time of the API; None for Go's zero time, which stands for "not yet"."""
    if not value:
        return None
    time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    return time if time.year > 1970 else None
