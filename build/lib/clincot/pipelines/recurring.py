"""Keeps one recurring run as the plan and the schedule describe it.

Kubeflow cannot change a recurring run in place, so a new recurring run replaces the old one. Its name is a hash of
its content (pipeline, schedule, account). The new one is created first, then the old ones are disabled and deleted. If
this is interrupted, one recurring run exists at any time, and the next call completes the change. Calling it again
without a change does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clincot.errors import InvalidInput
from clincot.pipelines.client import Connection, kfp_errors
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.submit import check_run_inputs, upload_pipeline
from clincot.records import hash_json

_CRON_FIELDS = 6  # a cron expression of Kubeflow begins with seconds


@dataclass(frozen=True)
class RunSchedule:
    """When a recurring run starts: a cron expression with seconds, or an interval in seconds."""

    cron: str = ""
    interval_s: int = 0

    def __post_init__(self) -> None:
        if bool(self.cron) == bool(self.interval_s):
            raise InvalidInput("a schedule needs exactly one of --cron and --interval")
        if self.cron and len(self.cron.split()) != _CRON_FIELDS:
            raise InvalidInput(
                f"--cron {self.cron!r}: expected six fields, seconds first (Kubeflow's cron): '0 0 2 * * *' is every "
                "night at two"
            )
        if self.interval_s < 0:
            raise InvalidInput(f"--interval must be above 0, got {self.interval_s}")

    def __str__(self) -> str:
        return f"cron {self.cron}" if self.cron else f"every {self.interval_s} s"


def reconcile_recurring_run(connection: Connection, plan: RoundPlan, timing: RunSchedule) -> list[str]:
    """Make the recurring run match plan and schedule; return one line for each change. Raises PipelinesFailed."""
    check_run_inputs(plan)
    version = upload_pipeline(connection, plan)
    account = plan.cluster.service_account
    digest = hash_json([version.name, timing.cron, timing.interval_s, account])[:12]
    name, experiment = f"{connection.pipeline}-{digest}", connection.ensure_experiment()
    before = list_recurring_runs(connection, experiment)
    same = sorted(
        (one for one in before if one.display_name == name), key=lambda one: (one.created_at, one.recurring_run_id)
    )
    done = []
    client = connection.client
    with kfp_errors(connection.endpoint):
        if not same:
            same = [
                client.create_recurring_run(
                    experiment,
                    name,
                    description=str(timing),
                    cron_expression=timing.cron or None,
                    interval_second=timing.interval_s or None,
                    max_concurrency=1,
                    no_catchup=True,
                    pipeline_id=version.pipeline_id,
                    version_id=version.id,
                    enabled=True,
                    service_account=account or None,
                )
            ]
            done.append(f"created {name}: {timing}")
        elif _is_disabled(same[0]):
            client.enable_recurring_run(same[0].recurring_run_id)
            done.append(f"enabled {name}")
    kept = same[0].recurring_run_id
    done += _delete_runs(connection, [one for one in before if one.recurring_run_id != kept])
    return done or [f"{name} is up to date: {timing}"]


def delete_recurring_runs(connection: Connection) -> list[str]:
    """Disable and delete every recurring run of ours; return one line for each."""
    return _delete_runs(connection, list_recurring_runs(connection, connection.ensure_experiment()))


def list_recurring_runs(connection: Connection, experiment: str) -> list[Any]:
    """List the recurring runs of the experiment whose names this module made."""
    ours = re.compile(re.escape(connection.pipeline) + r"-[0-9a-f]{12}")
    recurring: list[Any] = []
    token = ""
    with kfp_errors(connection.endpoint):
        while True:
            page = connection.client.list_recurring_runs(page_token=token, page_size=100, experiment_id=experiment)
            recurring += [one for one in page.recurring_runs or [] if ours.fullmatch(one.display_name or "")]
            token = page.next_page_token
            if not token:
                return recurring


def describe_trigger(one: Any) -> str:
    """Return in words when a recurring run starts."""
    trigger = one.trigger
    if trigger is not None and trigger.cron_schedule is not None:
        return f"cron {trigger.cron_schedule.cron}"
    if trigger is not None and trigger.periodic_schedule is not None:
        return f"every {trigger.periodic_schedule.interval_second} s"
    return "no trigger"


def _delete_runs(connection: Connection, old: Sequence[Any]) -> list[str]:
    done = []
    for one in old:
        with kfp_errors(connection.endpoint):
            if not _is_disabled(one):  # otherwise a run that is due during the deletion would still start
                connection.client.disable_recurring_run(one.recurring_run_id)
            connection.client.delete_recurring_run(one.recurring_run_id)
        done.append(f"removed {one.display_name} ({one.recurring_run_id})")
    return done


def _is_disabled(one: Any) -> bool:
    return str(one.status or one.mode) in ("DISABLED", "DISABLE")
