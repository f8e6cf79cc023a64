"""Keeps one recurring run of a model line as the plan and the schedule describe it.

Kubeflow cannot change a recurring run in place, so a new recurring run replaces the old one. The description says whose
it is, and holds a hash of its content (pipeline, schedule, account). The new one is created first, then the old ones
are disabled and deleted. If this is interrupted, one recurring run exists at any time, and the next call completes the
change. Calling it again without a change does nothing.

All recurring runs of the namespace are searched, so that a renamed pipeline, experiment or model line leaves none
behind. Those of other model lines and installations, and those that people made in the UI, are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from clincot.errors import InvalidInput
from clincot.pipelines.client import Connection, iter_pages, kfp_errors
from clincot.pipelines.ownership import Owner, find_owner, read_description, read_owner, write_description
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.submit import check_run_inputs, upload_pipeline
from clincot.records import hash_json

_CRON_FIELDS = 6  # a cron expression of Kubeflow begins with seconds
# Names from before the description said whose a recurring run is: those of the pipeline and a hash.
_NAME_BEFORE = re.compile(r"[a-z][-a-z0-9]*-[0-9a-f]{12}")


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
    owner = replace(connection.owner, line=plan.params.publish.name, store=plan.params.publish.store)
    version = upload_pipeline(connection, plan)
    experiment = connection.ensure_experiment()
    account = plan.cluster.service_account
    digest = hash_json([version.name, experiment, timing.cron, timing.interval_s, account])[:12]
    before = [one for one in list_recurring_runs(connection) if _replaces(connection, owner, one)]
    same = sorted(
        (one for one in before if _read_digest(one) == digest), key=lambda one: (one.created_at, one.recurring_run_id)
    )
    name = f"{owner.recurring_name} ({digest})"
    done = []
    client = connection.client
    with kfp_errors(connection.endpoint):
        if not same:
            about = f"Rounds of the model line {owner.line}, {timing}. Kept by `clincot pipeline schedule`."
            same = [
                client.create_recurring_run(
                    experiment,
                    owner.recurring_name,
                    description=write_description(about, owner, content=digest),
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
    """Disable and delete every recurring run of the connection's owner; return one line for each.

    Without the address of a store, an installation deletes its own. A person deletes those of the line, if they are all
    of one store. Raises InvalidInput if they are not.
    """
    found = list_recurring_runs(connection)
    owner = connection.owner
    if not owner.store and not owner.installation:
        owners = [_find_owner(connection, one) for one in found]
        stores = {other.store for other in owners if other is not None and other.line == owner.line}
        if len(stores) > 1:
            raise InvalidInput(
                f"the model line {owner.line} has recurring runs for several stores ({', '.join(sorted(stores))}); say "
                "which one with --set publish.store=ADDRESS"
            )
        owner = replace(owner, store=stores.pop() if stores else "")
    return _delete_runs(connection, [one for one in found if _replaces(connection, owner, one)])


def list_recurring_runs(connection: Connection) -> list[Any]:
    """List the recurring runs of the namespace that this module made, for whichever model line."""
    list_page = partial(connection.client.list_recurring_runs, namespace=connection.namespace or None)
    with kfp_errors(connection.endpoint):
        return [one for one in iter_pages(list_page, "recurring_runs") if _is_kept(one)]


def list_line_runs(connection: Connection) -> list[Any]:
    """List the recurring runs of the connection's model line, of whichever store, and those of its installation."""
    owner, found = connection.owner, []
    for one in list_recurring_runs(connection):
        other = _find_owner(connection, one)
        if other is not None and (other.line == owner.line or owner.replaces(other)):
            found.append(one)
    return found


def _is_kept(one: Any) -> bool:
    return read_owner(one.description) is not None or _NAME_BEFORE.fullmatch(one.display_name or "") is not None


def _replaces(connection: Connection, owner: Owner, one: Any) -> bool:
    other = _find_owner(connection, one)
    return other is not None and owner.replaces(other)


def _find_owner(connection: Connection, one: Any) -> Owner | None:
    """Return whose a recurring run is, from its description or else from the pipeline that it starts."""
    owner = read_owner(one.description)
    source = one.pipeline_version_reference
    if owner is not None or source is None or not source.pipeline_version_id:
        return owner
    version = connection.find_version(source)
    if version is None:
        return None
    return find_owner(version.pipeline_spec, one.runtime_config.parameters if one.runtime_config else None)


def _read_digest(one: Any) -> str:
    return (read_description(one.description) or {}).get("content", "")


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
