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
from functools import partial
from pathlib import Path
from typing import Any

from kfp_server_api import ApiException

from clincot.errors import InvalidInput
from clincot.pipelines.client import (
    Connection,
    PipelinesFailed,
    PipelinesUnavailable,
    iter_pages,
    kfp_errors,
    read_reason,
)
from clincot.pipelines.ownership import read_owner, write_description
from clincot.pipelines.round import compile_round
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.run_record import TERMINAL_STATES

POLL_S = 5.0
# PlatformSpec.pipelineConfig has activeDeadlineSeconds and resourceTtlOnCompletion since this release. An older server
# takes a platform spec with unknown fields for "no platform spec" and runs the pipeline without Secrets, tolerations
# and volumes (kubeflow/pipelines, api/v2alpha1/pipeline_spec.proto and backend/src/apiserver/template/v2_template.go:
# IsPlatformSpecWithKubernetesConfig, at 2.15.0, 2.16.1 and 2.17.0; tests/pipelines/test_pipeline_spec_versions.py).
MIN_SERVER_VERSION = (2, 17)
_log = logging.getLogger(__name__)
_RELEASE = re.compile(r"v?(\d+)\.(\d+)(?!\d)")


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
    if not check_server_version(connection):
        upload_pipeline(connection, plan)  # what the server stores of it shows whether it is new enough
    with compile_to_file(plan) as (path, _):
        experiment = connection.ensure_experiment()
        with kfp_errors(connection.endpoint):
            run = connection.client.run_pipeline(
                experiment_id=experiment,
                job_name=name or f"{connection.pipeline} {datetime.now(UTC).isoformat(timespec='seconds')}",
                pipeline_package_path=str(path),
                service_account=plan.cluster.service_account or None,
            )
    return SubmittedRun(run.run_id, connection.link_run(run.run_id))


def wait_for_run(connection: Connection, run: SubmittedRun, *, seconds: float) -> str:
    """Wait until the run ends and return its state. Raises PipelinesFailed if it takes longer than `seconds`.

    The run goes on while the server is away, so that only a warning is logged.
    """
    deadline, state = time.monotonic() + seconds, "PENDING"
    while True:
        try:
            state = str(get_run(connection, run.id).state or "PENDING")
        except PipelinesUnavailable as error:
            if time.monotonic() >= deadline:
                raise
            _log.warning("%s", error)
        if state in TERMINAL_STATES:
            return state
        if time.monotonic() >= deadline:
            raise PipelinesFailed(
                f"{run.url}: {state} after {seconds:g} s; the run goes on, see `clincot pipeline status {run.id}`"
            )
        time.sleep(min(POLL_S, seconds))


def upload_pipeline(connection: Connection, plan: RoundPlan) -> PipelineVersion:
    """Upload the pipeline to the UI under a hash of its content, unless the UI has this version already."""
    check_server_version(connection)
    with compile_to_file(plan) as (path, digest), kfp_errors(connection.endpoint):
        name = f"{connection.pipeline}-{digest}"
        pipeline = _ensure_pipeline(connection, path)
        version = _ensure_version(connection, path, pipeline, name)
        _check_stored_version(connection, pipeline, version, name)
        return PipelineVersion(
            pipeline, version, name, f"{connection.ui}/#/pipelines/details/{pipeline}/version/{version}"
        )


def check_server_version(connection: Connection) -> bool:
    """Return whether the server reports a supported version. Raises PipelinesFailed if it reports an older one.

    Images that were built without a tag report "unknown"; then only what the server stores shows what it understands
    (see _check_stored_version).
    """
    numbers = _RELEASE.match(connection.server_version)
    if numbers is None:
        return False
    if (int(numbers[1]), int(numbers[2])) < MIN_SERVER_VERSION:
        raise PipelinesFailed(
            f"{connection.endpoint}: Kubeflow Pipelines is {connection.server_version}, expected "
            f"{_format_version(MIN_SERVER_VERSION)} or later: older servers ignore Secrets, tolerations, volumes and "
            "deadlines of the pipeline without an error"
        )
    return True


def _check_stored_version(connection: Connection, pipeline: str, version: str, name: str) -> None:
    """Raise PipelinesFailed if the server has dropped the platform half of a version.

    A server stores what it has understood (kubeflow/pipelines 2.16.1 and 2.17.0,
    backend/src/apiserver/template/v2_template.go: Bytes). A version that an older server stored stays incomplete after
    the server is upgraded.
    """
    stored = connection.client.get_pipeline_version(pipeline, version).pipeline_spec or {}
    if "platform_spec" in stored:
        return
    needed = _format_version(MIN_SERVER_VERSION)
    if _RELEASE.match(connection.server_version):
        remedy = f"an older release stored it; delete the version {name} of {connection.pipeline} in the UI and repeat"
    else:
        remedy = f"it is older than {needed}, and runs would start without Secrets, tolerations and volumes"
    raise PipelinesFailed(
        f"{connection.endpoint}: the server holds the pipeline version {name} without its Kubernetes settings: {remedy}"
    )


def _format_version(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


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
    about = write_description(f"Rounds of the model line {connection.owner.line}.", connection.owner)
    try:
        created: str = client.upload_pipeline(
            str(path), connection.pipeline, description=about, namespace=namespace
        ).pipeline_id
    except ApiException as error:
        if error.status == 400:
            raise _explain_refused_upload(connection, error) from None
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
    if not page.pipelines:
        return None
    pipeline = page.pipelines[0]
    owner = read_owner(pipeline.description)
    if owner is not None and not connection.owner.shares_pipeline(owner):
        raise PipelinesFailed(
            f"{connection.endpoint}: the pipeline {connection.pipeline} belongs to {owner}, not to {connection.owner}; "
            "choose another name with --pipeline (pipeline.name of the chart)"
        )
    return str(pipeline.pipeline_id)


def _explain_refused_upload(connection: Connection, error: ApiException) -> PipelinesFailed:
    """Return an error for HTTP 400, which the upload server also answers if the account lacks the permission.

    kubeflow/pipelines 2.17.0, backend/src/apiserver/server/pipeline_upload_server.go: uploadPipeline.
    """
    reason = read_reason(error)
    if connection.namespace and reason in ("Failed to create a pipeline", "Failed to create a pipeline version"):
        return PipelinesFailed(
            f"{connection.endpoint}: HTTP 400, {reason}: the account of the token may not create pipelines in the "
            f"namespace {connection.namespace}; check --namespace and the roles of the account"
        )
    return PipelinesFailed(
        f"{connection.endpoint}: HTTP 400, the server does not accept the pipeline ({reason}); is it "
        f"Kubeflow Pipelines {_format_version(MIN_SERVER_VERSION)} or later?"
    )


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
        if error.status == 400:
            raise _explain_refused_upload(connection, error) from None
        found = _find_version(connection, pipeline, name) if error.status == 409 else None
        if found is None:
            raise
        return found
    return uploaded


def _find_version(connection: Connection, pipeline: str, name: str) -> str | None:
    for version in iter_pages(partial(connection.client.list_pipeline_versions, pipeline), "pipeline_versions"):
        if version.display_name == name:
            return str(version.pipeline_version_id)
    return None
