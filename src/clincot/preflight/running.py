"""Runs the checks side by side, each against the clock, and writes what they found."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clincot.config import PreflightSection
from clincot.errors import ForTheUser
from clincot.jsonl import write_json, write_records, written_aside
from clincot.preflight.report import Check, PreflightFailed, PreflightReport, StartingPolicy, failed, passed, table

Metrics = dict[str, float]


@dataclass(frozen=True)
class Probe:
    """A few checks that build on one another, in `limit_s` seconds. An error for the user is a failed check as well."""

    name: str
    tried: str
    mend: str
    limit_s: float
    run: Callable[[], Iterable[Check]]


def look(section: PreflightSection, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> Metrics:
    """Run every check; write the report and the table, and, where nothing failed, the round's starting policy.

    Raises PreflightFailed, naming all checks that failed; the report and the table are there by then.
    """
    outputs["champion"].unlink(missing_ok=True)  # of an earlier look, when all was well
    outputs["report"].parent.mkdir(parents=True, exist_ok=True)
    start: list[StartingPolicy] = []
    found = run_probes(probes(section, inputs, outputs["report"].parent, start))
    report = PreflightReport(checks=tuple(found))
    write_json(outputs["report"], report.model_dump(mode="json"))
    with written_aside(outputs["table"]) as file:
        file.write(table(report.checks))
    if report.failed:
        raise PreflightFailed(
            f"{len(report.failed)} of {len(report.checks)} checks failed: "
            + ", ".join(check.name for check in report.failed)
            + f" ({outputs['table']})"
        )
    write_records(outputs["champion"], start)
    states = [check.state for check in report.checks]
    return {"passed": states.count("pass"), "skipped": states.count("skipped"), "round": start[0].round}


def probes(
    section: PreflightSection, inputs: Mapping[str, Path], work: Path, start: list[StartingPolicy]
) -> list[Probe]:
    """What is looked at, in the order of the table. The starting policy is put into `start` when it is found."""
    from clincot.preflight import cluster_checks, judges, repository, starting, stores

    return [
        *stores.probes(section),
        *repository.probes(section),
        *judges.probes(section),
        *starting.probes(section, start),
        *cluster_checks.probes(section, inputs),
        Probe("disk", "free space", "free some space, or set preflight.free_gb", section.timeout_s,
              lambda: disk(section.free_gb, work)),
    ]  # fmt: skip


def run_probes(asked: Sequence[Probe]) -> list[Check]:
    """All probes at once, each in a thread of its own; checks in the probes' order.

    What has not ended by its limit has failed. Its thread is left behind (nothing in Python ends it) and keeps no
    process from ending.
    """
    began = time.monotonic()
    answers = [_Answer(probe) for probe in asked]
    for answer in answers:
        threading.Thread(target=answer.run, name=f"preflight {answer.probe.name}", daemon=True).start()
    found: list[Check] = []
    for answer in answers:
        probe = answer.probe
        ended = answer.ended.wait(timeout=max(0.0, began + probe.limit_s - time.monotonic()))
        found += answer.checks[:]  # what was found before it hung or broke off, too
        if not ended:
            found.append(failed(probe.name, probe.tried, f"no answer within {probe.limit_s:g} s", probe.mend))
        elif isinstance(answer.error, (ForTheUser, OSError)):
            found.append(failed(probe.name, probe.tried, str(answer.error), probe.mend))
        elif answer.error is not None:
            raise answer.error  # a fault of the program
    return found


class _Answer:
    """What a probe has found so far."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.checks: list[Check] = []
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            self.checks.extend(self.probe.run())
        except BaseException as error:  # for the thread that waits, which tells or raises it
            self.error = error
        finally:
            self.ended.set()


def disk(least_gb: float, work: Path) -> Iterator[Check]:
    """The space left in the work folder and where temporary files go."""
    for name, place in (("disk: work folder", work), ("disk: TMPDIR", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(place).free / 1e9
        tried, came = f"{place}: at least {least_gb:g} GB free", f"{free:.1f} GB"
        mend = "free some space, mount a larger volume, or set preflight.free_gb"
        yield passed(name, tried, came) if free >= least_gb else failed(name, tried, came, mend)
