"""Submits runs of the pipeline, uploads it to the UI, and waits for runs."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kfp_server_api import ApiException

from clincot.errors import InvalidInput
from clincot.pipelines.client import Connection, PipelinesFailed, kfp_errors
from clincot.pipelines.round import compile_round
from clincot.pipelines.round_plan import RoundPlan

TERMINAL_STATES = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED", "CANCELLED")
POLL_S = 5.0


@dataclass(frozen=True)
class SubmittedRun:
    id: str
    url: str


@dataclass(frozen=True)
class PipelineVersion:
    """A version of the pipeline in the UI, named by a hash of its content."""

    pipeline_id: str
    id: str
    name: str
    url: str


@contextmanager
def compile_to_file(plan: RoundPlan) -> Iterator[tuple[Path, str]]:
    """Yield the compiled pipeline of the plan as a file, and the first 12 characters of its sha256."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "round.yaml"
        compile_round(plan, path)
        yield path, hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def submit_run(connection: Connection, plan: RoundPlan, *, name: str = "") -> SubmittedRun:
    """Start a run. Raises PipelinesFailed, and InvalidInput if the plan lacks data, benchmark or store."""
    check_run_inputs(plan)
    with compile_to_file(plan) as (path, _):
        experiment = connection.ensure_experiment()
        with kfp_errors(connection.endpoint):
            run = connection.client.run_pipeline(
                experiment_id=experiment,
                job_name=name or f"{connection.pipeline} {datetime.now(UTC).isoformat(timespec='seconds')}",
                pipeline_package_path=str(path),
                service_account=plan.cluster.service_account or None,
            )
    return SubmittedRun(run.run_id, f"{connection.ui}/#/runs/details/{run.run_id}")


def wait_for_run(connection: Connection, run: SubmittedRun, *, seconds: float) -> str:
    """Wait until the run ends and return its state. Raises PipelinesFailed if it takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while (state := get_run(connection, run.id).state or "PENDING") not in TERMINAL_STATES:
        if time.monotonic() >= deadline:
            raise PipelinesFailed(f"{run.url}: {state} after {seconds:g} s")
        time.sleep(min(POLL_S, seconds))
    return str(state)


def upload_pipeline(connection: Connection, plan: RoundPlan) -> PipelineVersion:
    """Upload the pipeline to the UI under a hash of its content, unless the UI has this version already."""
    with compile_to_file(plan) as (path, digest), kfp_errors(connection.endpoint):
        client, name = connection.client, f"{connection.pipeline}-{digest}"
        pipeline = client.get_pipeline_id(connection.pipeline)
        if pipeline is None:
            pipeline = client.upload_pipeline(
                str(path), connection.pipeline, namespace=connection.namespace or None
            ).pipeline_id
        uploaded = next((one for one in _iter_versions(connection, pipeline) if one.display_name == name), None)
        if uploaded is None:
            uploaded = client.upload_pipeline_version(str(path), name, pipeline_id=pipeline)
        version = uploaded.pipeline_version_id
        return PipelineVersion(
            pipeline, version, name, f"{connection.ui}/#/pipelines/details/{pipeline}/version/{version}"
        )


def check_run_inputs(plan: RoundPlan) -> None:
    """Raise InvalidInput if a run on a cluster could not succeed with this plan."""
    for flag, address in (("--data", plan.data), ("--benchmark", plan.benchmark)):
        if not address:
            raise InvalidInput(
                f"{flag} is missing; upload the data set with `clincot pipeline put`, which prints the address"
            )
        if "://" not in address and not address.startswith("/"):
            raise InvalidInput(
                f"{flag} {address}: pods cannot read folders of this machine; expected s3://… or a mounted path"
            )
    if not plan.params.publish.store:
        raise InvalidInput("publish.store is empty; runs on a cluster keep champion and records there (s3://…)")


def get_run(connection: Connection, run_id: str) -> Any:
    with kfp_errors(connection.endpoint):
        try:
            return connection.client.get_run(run_id)
        except ApiException as error:
            if error.status == 404:
                raise PipelinesFailed(f"{connection.endpoint}: no run has the id {run_id}") from None
            raise


def _iter_versions(connection: Connection, pipeline: str) -> Iterator[Any]:
    token = ""
    while True:
        page = connection.client.list_pipeline_versions(pipeline, page_token=token, page_size=100)
        yield from page.pipeline_versions or []
        token = page.next_page_token
        if not token:
            return
