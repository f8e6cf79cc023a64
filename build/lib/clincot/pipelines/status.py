"""Status of a run, or of the recurring run and its latest runs, as text."""

from __future__ import annotations

from clincot.pipelines.client import Connection, kfp_errors
from clincot.pipelines.recurring import describe_trigger, list_recurring_runs
from clincot.pipelines.submit import get_run


def format_run_status(connection: Connection, run_id: str) -> str:
    """Return a run and its tasks as text. Raises PipelinesFailed."""
    run = get_run(connection, run_id)
    lines = [f"{run.display_name}: {run.state or 'PENDING'}", f"{connection.ui}/#/runs/details/{run_id}"]
    if run.error is not None and run.error.message:
        lines.append(f"error: {run.error.message}")
    tasks = (run.run_details.task_details or []) if run.run_details is not None else []
    lines += [f"  {task.state or 'PENDING':10} {task.display_name}" for task in tasks]
    return "\n".join(lines)


def format_schedule_status(connection: Connection) -> str:
    """Return the recurring run and its latest runs as text."""
    experiment = connection.ensure_experiment()
    lines = [
        f"{recurring.display_name}: {recurring.status or recurring.mode}, {describe_trigger(recurring)}"
        for recurring in list_recurring_runs(connection, experiment)
    ]
    with kfp_errors(connection.endpoint):
        runs = connection.client.list_runs(experiment_id=experiment, sort_by="created_at desc", page_size=10).runs or []
    lines = lines or ["no recurring run"]
    return "\n".join([*lines, *(f"  {run.state or 'PENDING':10} {run.run_id} {run.display_name}" for run in runs)])
