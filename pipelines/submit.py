"""Submits runs of the pipeline, uploads it to the UI, and waits for runs."""

from __future__ import annotations

import hashlib
import json
import logging
import re
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
# PlatformSpec.pipelineConfig has activeDeadlineSeconds and resourceTtlOnCompletion since this release. An older server
# takes a platform spec with unknown fields for "no platform spec" and runs the pipeline without Secrets, tolerations
# and volumes (kubeflow/pipelines, api/v2alpha1/pipeline_spec.proto and backend/src/apiserver/template/v2_template.go:
# IsPlatformSpecWithKubernetesConfig, at 2.15.0, 2.16.1 and 2.17.0).
MIN_SERVER_VERSION = (2, 17)

_log = logging.getLogger(__name__)


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
    check_server_version(connection)
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
    check_server_version(connection)
    with compile_to_file(plan) as (path, digest), kfp_errors(connection.endpoint):
        name = f"{connection.pipeline}-{digest}"
        pipeline = _ensure_pipeline(connection, path)
        version = _ensure_version(connection, path, pipeline, name)
        return PipelineVersion(
            pipeline, version, name, f"{connection.ui}/#/pipelines/details/{pipeline}/version/{version}"
        )


def check_server_version(connection: Connection) -> None:
    """Raise PipelinesFailed if the server would ignore the platform half of the pipeline; warn if it is unknown."""
    numbers = re.match(r"v?(\d+)\.(\d+)(?!\d)", connection.server_version)
    needed = ".".join(map(str, MIN_SERVER_VERSION))
    if numbers is None:
        _log.warning(
            "%s: the server does not report its version (%s); it must be Kubeflow Pipelines %s or later, because older "
            "ones ignore Secrets, tolerations and volumes",
            connection.endpoint,
            connection.server_version,
            needed,
        )
    elif (int(numbers[1]), int(numbers[2])) < MIN_SERVER_VERSION:
        raise PipelinesFailed(
            f"{connection.endpoint}: Kubeflow Pipelines is {connection.server_version}, expected {needed} or later: "
            "older servers ignore Secrets, tolerations, volumes and deadlines of the pipeline without an error"
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


def _ensure_pipeline(connection: Connection, path: Path) -> str:
    """Return the id of our pipeline in the namespace of the connection; create the pipeline if it does not exist."""
    found = _find_pipeline(connection)
    if found is not None:
        return found
    client, namespace = connection.client, connection.namespace or None
    try:
        created: str = client.upload_pipeline(str(path), connection.pipeline, namespace=namespace).pipeline_id
    except ApiException as error:
        if error.status != 409:
            raise
        found = _find_pipeline(connection)  # another caller created it after the look-up
        if found is None:
            raise PipelinesFailed(
                f"{connection.endpoint}: HTTP 409, a pipeline named {connection.pipeline} exists already, but the "
                f"server does not list it in namespace {namespace or '(shared)'}; choose another name with --pipeline"
            ) from None
        return found
    return created


def _find_pipeline(connection: Connection) -> str | None:
    """Return the id of our pipeline in the namespace of the connection, never that of a shared pipeline.

    The name is unique within a namespace, and a list without a namespace holds only the shared pipelines of a
    multi-user installation (kubeflow/pipelines 2.17.0, backend/src/apiserver/model/pipeline.go and
    server/pipeline_server.go: listPipelines), so kfp.Client.get_pipeline_id cannot be used.
    """
    by_name = {"predicates": [{"operation": "EQUALS", "key": "name", "stringValue": connection.pipeline}]}
    page = connection.client.list_pipelines(filter=json.dumps(by_name), namespace=connection.namespace or None)
    return page.pipelines[0].pipeline_id if page.pipelines else None


def _ensure_version(connection: Connection, path: Path, pipeline: str, name: str) -> str:
    """Return the id of the version with this name; upload the version if it does not exist."""
    found = _find_version(connection, pipeline, name)
    if found is not None:
        return found
    try:
        uploaded: str = connection.client.upload_pipeline_version(
            str(path), name, pipeline_id=pipeline
        ).pipeline_version_id
    except ApiException as error:
        found = _find_version(connection, pipeline, name) if error.status == 409 else None
        if found is None:
            raise
        return found
    return uploaded


def _find_version(connection: Connection, pipeline: str, name: str) -> str | None:
    for version in _iter_versions(connection, pipeline):
        if version.display_name == name:
            return str(version.pipeline_version_id)
    return None


def _iter_versions(connection: Connection, pipeline: str) -> Iterator[Any]:
    token = ""
    while True:
        page = connection.client.list_pipeline_versions(pipeline, page_token=token, page_size=100)
        yield from page.pipeline_versions or []
        token = page.next_page_token
        if not token:
            return
