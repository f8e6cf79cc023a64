"""Runs the checks side by side, each against the clock, and writes what they found."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
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
    """Run every check; write the report and the table, and, where nothing failed, the round's starting policy.

    Raises PreflightFailed, naming all checks that failed; the report and the table are there by then.
    """
    outputs["champion"].unlink(missing_ok=True)  # of an earlier look, when all was well
    outputs["report"].parent.mkdir(parents=True, exist_ok=True)
    start: list[StartingPolicy] = []
    found = run_probes(build_probes(config, inputs, outputs["report"].parent, start))
    report = PreflightReport(checks=tuple(found))
    write_json(outputs["report"], report.model_dump(mode="json"))
    with atomic_write(outputs["table"]) as file:
        file.write(render_check_table(report.checks))
    if report.failed:
        raise PreflightFailed(
            f"{len(report.failed)} of {len(report.checks)} checks failed: "
            + ", ".join(check.name for check in report.failed)
            + f" ({outputs['table']})"
        )
    write_records(outputs["champion"], start)
    states = [check.state for check in report.checks]
    return {"passed": states.count("pass"), "skipped": states.count("skipped"), "round": start[0].round}


def build_probes(
    config: PreflightConfig, inputs: Mapping[str, Path], work: Path, start: list[StartingPolicy]
) -> list[Probe]:
    """What is looked at, in the order of the table. The starting policy is put into `start` when it is found."""
    from clincot.preflight import cluster, judges, repository, starting_policy, stores

    return [
        *stores.build_store_probes(config),
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
    """The space left in the work folder and where temporary files go."""
    for name, place in (("disk: work folder", work), ("disk: TMPDIR", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(place).free / 1e9
        tried, came = f"{place}: at least {least_gb:g} GB free", f"{free:.1f} GB"
        mend = "free some space, mount a larger volume, or set preflight.free_gb"
        yield pass_check(name, tried, came) if free >= least_gb else fail_check(name, tried, came, mend)
