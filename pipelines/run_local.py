"""Runs the tasks of the pipeline on this machine with kfp.local, in one process each, as pods run them on a cluster.

RUN/run.json     which round this is; a run that is started again in the folder resumes it
RUN/store/       checkpoints, champion pointer and records, unless publish.store names another store
RUN/kfp/         files that the tasks wrote, one folder for each run of a task
RUN/cache/       cache of kfp: a task that succeeded does not run again with the same inputs
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kfp import local

import clincot
from clincot.config import PublishConfig
from clincot.deployment.service_settings import get_user_name
from clincot.errors import InvalidInput, UserError
from clincot.jsonl import InvalidRecord, hash_files, write_json
from clincot.pipelines.cluster_settings import ClusterSettings, ContainerResources, ResourceProfile, RetryPolicy
from clincot.pipelines.fork_server import preloaded_python
from clincot.pipelines.round import build_round_pipeline
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.tasks import ERRORS_ENV
from clincot.preferences.versions.dvc import DvcFailed
from clincot.preferences.versions.git import GitFailed
from clincot.processes import retry_call
from clincot.records import hash_json
from clincot.registry.champion import NoChampion, create_champion_pointer, read_champion
from clincot.registry.publication import PublicationEvidence, register_checkpoint
from clincot.runs.round_records import RoundOutputs, next_round_number, read_round_outputs
from clincot.storage.open import open_store
from clincot.storage.store import Store, StoreUnavailable

_NOMINAL_RESOURCES = ContainerResources(cpu="1", memory="1Gi")
LOCAL_CLUSTER = ClusterSettings(
    cpu=ResourceProfile(requests=_NOMINAL_RESOURCES, limits=_NOMINAL_RESOURCES, retries=RetryPolicy(count=0)),
    gpu=ResourceProfile(requests=_NOMINAL_RESOURCES, limits=_NOMINAL_RESOURCES, retries=RetryPolicy(count=0)),
)
RETRY_PAUSES_S = (10.0, 20.0, 40.0)
# Errors of services that may be back after a pause. Tasks report errors by the name of their class.
TRANSIENT_ERRORS = tuple(error.__name__ for error in (StoreUnavailable, GitFailed, DvcFailed))


class RunFailed(UserError, RuntimeError):
    """A task failed; the message names it and repeats its error."""


class _TransientFailure(RunFailed):
    """A failure that another attempt may not meet."""


def run_local(plan: RoundPlan, run: Path, *, policy: Path | None = None) -> str:
    """Run the pipeline of the plan in the folder `run`, or resume it there; return a summary of the rounds.

    policy: the base policy, which is published and becomes the round-0 champion if the model has no champion.
    Raises RunFailed and InvalidInput.
    """
    for option, address in (("--data", plan.data), ("--benchmark", plan.benchmark)):
        if not address:
            raise InvalidInput(f"{option} is missing: name a data set's folder or its address in a store")
    run = run.absolute()
    run.mkdir(parents=True, exist_ok=True)
    config = plan.params.publish
    if not config.store:
        config = config.model_copy(update={"store": str(run / "store")})
    store = open_store(config.store)
    if policy is not None:
        _ensure_base_champion(store, config, policy)
    number = _resolve_round_number(run, store, config)
    local_plan = replace(
        plan,
        params=plan.params.model_copy(update={"publish": config}),
        cluster=LOCAL_CLUSTER,
        number=number,
        data=_make_absolute(plan.data),
        benchmark=_make_absolute(plan.benchmark),
        blind_from=_make_absolute(plan.blind_from),
        code=f"clincot-{_hash_source()}",
        target="local",
        state=str(run / "serving"),
    )
    _run_with_retries(local_plan, run)
    return "\n".join(
        _format_summary(read_round_outputs(store, config.name, number + more)) for more in range(plan.rounds)
    )


def _run_with_retries(plan: RoundPlan, run: Path) -> None:
    """Run the pipeline, with retries like those of Kubeflow if the store or the data repository was unavailable."""
    errors = run / "errors.jsonl"
    os.environ[ERRORS_ENV] = str(errors)
    os.environ.setdefault("CLINCOT_CACHE", str(run / "cache"))
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(run / "kfp"),
        raise_on_error=True,
        enable_caching=True,
        cache_root=str(run / "cache" / "kfp"),
    )
    with preloaded_python() as python, _override_python(str(python)):
        attempts = itertools.count(1)

        def run_pipeline() -> None:
            first_attempt = next(attempts) == 1
            errors.unlink(missing_ok=True)
            process = multiprocessing.get_context("fork").Process(target=_run_once, args=(plan, errors))
            process.start()  # one process for each attempt, because the loops of kfp leak state
            process.join()
            if process.exitcode == 0:
                return
            failures = _read_errors(errors)
            if not failures:
                raise RunFailed("the pipeline failed because of an internal error; see its traceback above")
            message = "; ".join(failure["message"] for failure in failures)
            in_preflight = any(failure["message"].startswith("clincot preflight") for failure in failures)
            transient = any(failure["error"] in TRANSIENT_ERRORS for failure in failures)
            # A failure of the first preflight is a mistake in the settings; later, a service may be unavailable.
            if (in_preflight and first_attempt) or not (transient or in_preflight):
                raise RunFailed(message)
            raise _TransientFailure(message)

        retry_call(
            run_pipeline,
            is_transient=lambda error: isinstance(error, _TransientFailure),
            wait_s=lambda failures: RETRY_PAUSES_S[failures - 1],
            attempts=1 + len(RETRY_PAUSES_S),
            on_retry=lambda error, wait_s: logging.warning("%s; next attempt in %g s", error, wait_s),
        )


def _run_once(plan: RoundPlan, errors: Path) -> None:
    try:
        build_round_pipeline(plan)()
    except RuntimeError:  # kfp.local raises it when a task has failed
        if not errors.is_file():
            raise
        sys.exit(1)


def _read_errors(errors: Path) -> list[dict[str, str]]:
    lines = errors.read_text(encoding="utf-8").splitlines() if errors.is_file() else []
    return [json.loads(line) for line in lines]


@contextmanager
def _override_python(executable: str) -> Iterator[None]:
    """Replace sys.executable, with which kfp.local runs its tasks."""
    before, sys.executable = sys.executable, executable
    try:
        yield
    finally:
        sys.executable = before


def _ensure_base_champion(store: Store, config: PublishConfig, policy: Path) -> None:
    """Publish the base policy and make it the champion if the model has none."""
    try:
        read_champion(store, config.name)
    except NoChampion:
        manifest = register_checkpoint(store, policy, config, PublicationEvidence())
        create_champion_pointer(store, manifest, by=get_user_name())


def _resolve_round_number(run: Path, store: Store, config: PublishConfig) -> int:
    """Return the round that the folder runs; the first run in the folder decides it."""
    path, identity = run / "run.json", {"store": config.store, "line": config.name}
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InvalidRecord(f"{path}: not JSON: {error}") from None
        if {name: before.get(name) for name in identity} != identity:
            raise InvalidInput(
                f"{path}: this run was started with {before}, not with {identity}; choose another --run folder"
            )
        return int(before["number"])
    number = next_round_number(store, config.name)
    write_json(path, {**identity, "number": number})
    return number


def _hash_source() -> str:
    """Hash the source of the library, so that another version of it repeats its work."""
    package = Path(clincot.__file__).parent
    files = sorted(path for path in package.rglob("*.py") if "pipelines" not in path.parts)
    return hash_json([[path.name, hash_files(path)] for path in files])[:16]


def _make_absolute(location: str) -> str:
    return location if "://" in location or not location else str(Path(location).absolute())


def _format_summary(outputs: RoundOutputs) -> str:
    digests = "\n".join(f"  {name:13} {digest}" for name, digest in outputs.digests.items())
    return f"round {outputs.number}: {outputs.verdict} ({outputs.decision})\n{digests}"
