"""Status of a run, or of the recurring run and its latest runs, as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from clincot.pipelines.client import Connection, PipelinesFailed, PipelinesUnavailable, kfp_errors
from clincot.pipelines.recurring import describe_trigger, list_line_runs
from clincot.pipelines.run_record import TERMINAL_STATES, RunRecord, TaskRow, read_run_record
from clincot.pipelines.submit import get_run
from clincot.pipelines.task_logs import read_log_tail
from clincot.pipelines.verdict_lookup import describe_decision
from clincot.text import align_columns, format_count

LOG_LINES = 12
WATCH_S = 10.0
_RECENT_RUNS = 10


def format_run_status(connection: Connection, run_id: str) -> str:
    """Return a run, its tasks in time order, and the end of the log of what failed. Raises PipelinesFailed."""
    return _format_run(connection, get_run(connection, run_id))


def watch_run_status(
    connection: Connection, run_id: str, *, sleep: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """Yield the status of a run every few seconds, until the run has ended. Raises PipelinesFailed."""
    while True:
        try:
            run = get_run(connection, run_id)
            yield _format_run(connection, run)
            if run.state in TERMINAL_STATES:
                return
        except PipelinesUnavailable as error:  # the run goes on while the server is away
            yield str(error)
        sleep(WATCH_S)


def _format_run(connection: Connection, run: Any) -> str:
    spec = find_run_spec(connection, run)
    record = read_run_record(run, spec)
    lines = [f"{run.display_name}: {_describe_state(record)}", connection.link_run(run.run_id)]
    if run.error is not None and run.error.message:
        lines.append(f"error: {run.error.message.strip().splitlines()[0]}")
    lines += ["", *_format_rows(record.rows)]
    if record.incomplete:
        lines += ["", _explain_incomplete(record)]
    for row in record.failed_rows:
        lines += ["", *_describe_failure(connection, run.run_id, row)]
    if record.state == "FAILED" and not record.failed_rows:
        lines += ["", _explain_unknown_failure(record)]
    decision = describe_decision(run, spec) if record.state in TERMINAL_STATES else ""
    return "\n".join([*lines, *(["", decision] if decision else [])])


def find_run_spec(connection: Connection, run: Any) -> Any:
    """Return the compiled pipeline of a run; None if its version has been deleted.

    The API returns it with the run, unless the run was started from a version of a pipeline (kubeflow/pipelines 2.17.0,
    backend/src/apiserver/server/api_converter.go: toApiRun).
    """
    source = run.pipeline_version_reference
    if source is None or not source.pipeline_version_id:
        return run.pipeline_spec
    version = connection.find_version(source)
    return None if version is None else version.pipeline_spec


def format_schedule_status(connection: Connection) -> str:
    """Return the recurring run and its latest runs as text."""
    lines = [
        f"{recurring.display_name}: {recurring.status or recurring.mode}, {describe_trigger(recurring)}"
        for recurring in list_line_runs(connection)
    ]
    experiment = connection.find_experiment()
    runs: list[Any] = []
    if experiment is not None:
        with kfp_errors(connection.endpoint):
            page = connection.client.list_runs(
                experiment_id=experiment, sort_by="created_at desc", page_size=_RECENT_RUNS
            )
        runs = page.runs or []
    lines = lines or ["no recurring run"]
    return "\n".join([*lines, *(f"  {run.state or 'PENDING':10} {run.run_id} {run.display_name}" for run in runs)])


def _describe_state(record: RunRecord) -> str:
    state = f"{record.state} (terminated)" if record.terminated and record.state != "SUCCEEDED" else record.state
    if record.started is None:
        return state
    if record.ended is None or record.state not in TERMINAL_STATES:
        return f"{state}, started {record.started:%Y-%m-%d %H:%M:%S} UTC"
    took = _format_seconds((record.ended - record.started).total_seconds())
    return f"{state}, took {took}, ended {record.ended:%Y-%m-%d %H:%M:%S} UTC"


def _format_rows(rows: tuple[TaskRow, ...]) -> list[str]:
    """Return the tasks as a table. Times are UTC; a task that is running shows how long it has run."""
    if not rows:
        return ["The server does not hold the pipeline of this run any more; the tasks are shown in the UI."]
    cells = [("STARTED", "TASK", "STATE", "TOOK")]
    now = datetime.now(UTC)
    for row in rows:
        label = f"{row.label} ({format_count(row.count, 'part')})" if row.task.iterated and row.count > 1 else row.label
        started = f"{row.started:%H:%M:%S}" if row.started and row.state != "not reached" else ""
        ended = row.ended or (now if row.state == "running" else None)
        took = _format_seconds((ended - row.started).total_seconds()) if row.started and ended and started else ""
        cells.append((started, label, row.state, "" if row.state in ("cached", "skipped") else took))
    return align_columns(cells)


def _describe_failure(connection: Connection, run_id: str, row: TaskRow) -> list[str]:
    """Return what failed, and the end of its log if the server still has it."""
    try:
        tail = read_log_tail(connection, run_id, row, lines=LOG_LINES)
    except PipelinesFailed as error:
        return [f"{row.label} failed; its log cannot be read here ({error})"]
    if not tail:
        return [
            f"{row.label} failed; the server has no log of it any more. In the UI, its artifact executor-logs may have "
            "it (task, Input/Output)."
        ]
    return [f"{row.label} failed. The end of its log:", *(f"  | {line}" for line in tail)]


def _explain_incomplete(record: RunRecord) -> str:
    last = max((row for row in record.rows if row.started), key=_started_at, default=None)
    where = f" at '{last.label}'" if last is not None else ""
    outcome = "all tasks that it needed ran" if record.state == "SUCCEEDED" else "which task failed is not recorded"
    return (
        f"The server's record of this run stops{where}, although the run {record.state}: {outcome}. Kubeflow Pipelines "
        "records no more tasks of a workflow that became larger than 1 MB."
    )


def _explain_unknown_failure(record: RunRecord) -> str:
    if record.terminated:
        return "Somebody terminated the run. The next run resumes its round."
    return "The server does not say which task failed; look at the run in the UI, and at the log of its last task."


def _started_at(row: TaskRow) -> float:
    return row.started.timestamp() if row.started else 0.0


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
