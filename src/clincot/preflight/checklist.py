"""The preflight stage: runs all checks and writes their report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clincot.config import PreflightConfig, PublishConfig
from clincot.errors import UserError
from clincot.jsonl import atomic_write, write_json, write_records
from clincot.preflight.preflight_report import (
    PreflightCheck,
    PreflightFailed,
    PreflightReport,
    fail_check,
    pass_check,
    render_check_table,
)
from clincot.preflight.probe import Probe, run_probes
from clincot.records import StartingPolicy, format_time_now
from clincot.storage.open import open_store
from clincot.storage.store import write_latest

PreflightMetrics = dict[str, float]


def run_preflight(config: PreflightConfig, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> PreflightMetrics:
    """Run every check and write the report, the table and, if nothing failed, the round's starting policy.

    inputs, outputs: paths by the stage's names. Returns the stage's metrics. Raises PreflightFailed, which names all
    failed checks, after report and table have been written.
    """
    outputs["champion"].unlink(missing_ok=True)  # left by an earlier run that passed
    outputs["report"].parent.mkdir(parents=True, exist_ok=True)
    start: list[StartingPolicy] = []
    probes = build_probes(config, inputs, outputs["report"].parent, start)
    checks = [check_decision_arm(config, deploys="service" in inputs), *run_probes(probes)]
    write_checks(checks, outputs, config.publish)
    write_records(outputs["champion"], start)
    states = [check.state for check in checks]
    return {"passed": states.count("pass"), "skipped": states.count("skipped"), "round": start[0].round}


def write_checks(
    checks: Sequence[PreflightCheck], outputs: Mapping[str, Path], publish: PublishConfig | None = None
) -> None:
    """Write the report and the table. Raises PreflightFailed, which names every failed check with its result.

    publish: names the store in which the table of a failed preflight is kept.
    """
    report = PreflightReport(checks=tuple(checks))
    write_json(outputs["report"], report.model_dump(mode="json"))
    with atomic_write(outputs["table"]) as file:
        file.write(render_check_table(report.checks))
    if report.failed:
        results = "; ".join(f"{check.name}: {check.result}" for check in report.failed)
        stored = _store_failed_table(publish, outputs["table"]) if publish is not None else ""
        raise PreflightFailed(
            f"{len(report.failed)} of {len(report.checks)} checks failed: {results}"
            + (f" (the table is in {stored})" if stored else "")
        )


def check_decision_arm(config: PreflightConfig, *, deploys: bool) -> PreflightCheck:
    """Check that the benchmark is answered in the way on which the decision rests.

    deploys: whether a promoted checkpoint is rolled out. If the benchmark measures the answers that clients then get,
    the decision has to rest on them.
    """
    arm, arms = config.decide.arm, config.evaluate.arms
    probe = "evaluate.arms has the arm of the decision (decide.arm)"
    if deploys and arm != "served" and "served" in arms:
        result = f"decide.arm is {arm!r}, but evaluate.arms has served, the answers that clients get after a promotion"
        return fail_check("settings: decide.arm", probe, result, "set decide.arm to served")
    if arm in arms:
        return pass_check("settings: decide.arm", probe, arm)
    result = f"decide.arm is {arm!r}, and evaluate.arms has {', '.join(arms)}"
    return fail_check("settings: decide.arm", probe, result, f"add {arm} to evaluate.arms, or set decide.arm")


def _store_failed_table(publish: PublishConfig, table: Path) -> str:
    """Copy the table of a failed preflight to the store; return where it is, or "" if the store cannot be written.

    Kubeflow Pipelines 2.17.0 uploads no artifact of a failed task except its log (backend/src/v2/component/
    launcher_v2.go), and the log goes with the pod, so without this the table would be gone when somebody looks for it.
    """
    if not publish.store:
        return ""
    key = f"preflight/{publish.name}/failed.md"
    content = f"{format_time_now()}\n\n{table.read_text(encoding='utf-8')}"
    try:
        store = open_store(publish.store)
        write_latest(store, key, content.encode())
    except (UserError, OSError):  # the store is what preflight complains about; the table has it
        return ""
    return f"{store.url}/{key}"


def build_probes(
    config: PreflightConfig, inputs: Mapping[str, Path], work: Path, start: list[StartingPolicy]
) -> list[Probe]:
    """Build all probes, in the order of the table.

    work: the folder whose disk has to have space. start: the champion's probe appends the starting policy to it.
    """
    from clincot.preflight import cluster, data_sets, judges, repository, starting_policy, stores

    return [
        *stores.build_store_probes(config),
        *data_sets.build_data_set_probes(config),
        *repository.build_repository_probes(config),
        *judges.build_judge_probes(config),
        *starting_policy.build_champion_probes(config, start),
        *cluster.build_cluster_probes(config, inputs),
        Probe(
            "disk",
            "free space",
            "free some space, or set preflight.free_gb",
            config.timeout_s,
            lambda: check_disk(config.free_gb, work),
        ),
    ]


def check_disk(least_gb: float, work: Path) -> Iterator[PreflightCheck]:
    """Check the free space of the work folder and of the folder for temporary files."""
    remedy = "free some space, mount a larger volume, or set preflight.free_gb"
    for name, folder in (("disk: work folder", work), ("disk: TMPDIR", Path(tempfile.gettempdir()))):
        free_gb = shutil.disk_usage(folder).free / 1e9
        probe, result = f"{folder}: at least {least_gb:g} GB free", f"{free_gb:.1f} GB"
        if free_gb >= least_gb:
            yield pass_check(name, probe, result)
        else:
            yield fail_check(name, probe, result, remedy)
