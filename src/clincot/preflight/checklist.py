"""The preflight stage: runs all checks and writes their report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clincot.config import PreflightConfig
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
from clincot.records import StartingPolicy

PreflightMetrics = dict[str, float]


def run_preflight(config: PreflightConfig, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> PreflightMetrics:
    """Run every check and write the report, the table and, if nothing failed, the round's starting policy.

    inputs, outputs: paths by the stage's names. Returns the stage's metrics. Raises PreflightFailed, which names all
    failed checks, after report and table have been written.
    """
    outputs["champion"].unlink(missing_ok=True)  # left by an earlier run that passed
    outputs["report"].parent.mkdir(parents=True, exist_ok=True)
    start: list[StartingPolicy] = []
    checks = [check_decision_arm(config), *run_probes(build_probes(config, inputs, outputs["report"].parent, start))]
    write_checks(checks, outputs)
    write_records(outputs["champion"], start)
    states = [check.state for check in checks]
    return {"passed": states.count("pass"), "skipped": states.count("skipped"), "round": start[0].round}


def write_checks(checks: Sequence[PreflightCheck], outputs: Mapping[str, Path]) -> None:
    """Write the report and the table. Raises PreflightFailed, which names every failed check with its result."""
    report = PreflightReport(checks=tuple(checks))
    write_json(outputs["report"], report.model_dump(mode="json"))
    with atomic_write(outputs["table"]) as file:
        file.write(render_check_table(report.checks))
    if report.failed:
        results = "; ".join(f"{check.name}: {check.result}" for check in report.failed)
        raise PreflightFailed(f"{len(report.failed)} of {len(report.checks)} checks failed: {results}")


def check_decision_arm(config: PreflightConfig) -> PreflightCheck:
    """Check that the benchmark is answered in the way on which the decision rests."""
    arm, arms = config.decide.arm, config.evaluate.arms
    probe = "evaluate.arms has the arm of the decision (decide.arm)"
    if arm in arms:
        return pass_check("settings: decide.arm", probe, arm)
    result = f"decide.arm is {arm!r}, and evaluate.arms has {', '.join(arms)}"
    return fail_check("settings: decide.arm", probe, result, f"add {arm} to evaluate.arms, or set decide.arm")


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
