"""What happens to each task of a round under each fault. `python -m tests.faults.matrix --write` writes the page."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from clincot.text import format_count
from tests.faults.fault_world import ROOT, Attempt, FaultWorld, build_fault_world
from tests.support.recorded_round import RecordedTask

PAGE = ROOT / "docs" / "kubeflow" / "faults.md"
MARK = "<!-- generated below: python -m tests.faults.matrix --write -->"
NEXT_RUN = "next-run"
EXIT_TASK_S = 30.0  # from the end of the failed task to the start of the exit task's container
CODES = {137: "SIGKILL", 143: "SIGTERM"}
_MAX_CHARS = 260
# How a connection fails that is reset: at once, or when the request has been sent.
_NO_CONNECTION = (
    r"(?:EndpointConnectionError|ConnectionClosedError|ProtocolError|NewConnectionError|ConnectionResetError)"
)


class Cell(NamedTuple):
    """What a fault does to a task."""

    happens: str
    recorded: str  # in the store, after the run
    next_run: str  # what the next run of the line says when it starts
    told: str  # what the log of the task says


UNAFFECTED = Cell("not affected: same result", "as without the fault", "—", "nothing")


class Fault(NamedTuple):
    """A fault: how a row of the page names it, and how a task meets it."""

    title: str
    exercise: Callable[[FaultWorld, RecordedTask], Cell]


def exercise_outage(away: Mapping[str, float], status: int = 0) -> Callable[[FaultWorld, RecordedTask], Cell]:
    """A service is away from the start of the task on."""

    def exercise(world: FaultWorld, task: RecordedTask) -> Cell:
        if "store" not in away and runs_alone(world, task):
            return UNAFFECTED
        world.restore(task)
        world.plan.begin(away, status=status)
        before = world.list_stored()
        attempt = world.run(task)
        if attempt.code:
            return describe_failure(world, task, attempt, before)
        waits = find_waits(world, attempt)
        if not waits:
            return describe_success(world, task, attempt, "not affected", "nothing")
        return describe_success(world, task, attempt, "waits, then goes on", waits[0])

    return exercise


def runs_alone(world: FaultWorld, task: RecordedTask) -> bool:
    """Whether the task ends as undisturbed, without a wait, while judge and API server are both away for good."""

    def run() -> bool:
        world.plan.begin({"judge": 1e9, "cluster": 1e9}, status=401)
        attempt = world.run(task)
        return not find_waits(world, attempt) and world.made_the_same(task.name, attempt)

    return world.once(f"{task.name}-alone", run)


def exercise_full_disk(world: FaultWorld, task: RecordedTask) -> Cell:
    """No file of the process may grow (RLIMIT_FSIZE), from its start on."""
    world.plan.begin({})
    before = world.list_stored()
    attempt = world.run(task, fault="disk")
    if attempt.code:
        return describe_failure(world, task, attempt, before)
    return describe_success(world, task, attempt, "not affected", "nothing")


def exercise_lost_pod(signal: str) -> Callable[[FaultWorld, RecordedTask], Cell]:
    """The pod is lost while the task writes its outputs; Kubeflow Pipelines starts another one."""

    def exercise(world: FaultWorld, task: RecordedTask) -> Cell:
        world.plan.begin({})
        before = world.list_stored()
        end_by_signal(world, task, signal)
        left = describe_keys(world, before)
        again = world.run_again(task)
        happens = f"ends by {signal}; the next attempt"
        return describe_success(world, task, again, happens, "nothing", left)

    return exercise


def exercise_memory_limit(world: FaultWorld, task: RecordedTask) -> Cell:
    """The container exceeds its memory limit: the kernel kills the process, and the task has failed (exit code 137).

    Kubeflow Pipelines 2.17 gives it no other attempt, because a container that ended with a code is no lost pod.
    """
    world.plan.begin({})
    before = world.list_stored()
    end_by_signal(world, task, "SIGKILL")
    record_failure(world, task)
    recorded = describe_keys(world, before)
    return Cell("ends by SIGKILL (OOMKilled), no other attempt", recorded, start_next_run(world), "nothing")


def exercise_terminated(world: FaultWorld, task: RecordedTask) -> Cell:
    """Terminate in the UI: the pod gets SIGTERM, and neither the tasks that follow nor the exit task runs."""
    world.plan.begin({})
    before = world.list_stored()
    end_by_signal(world, task, "SIGTERM")
    recorded = describe_keys(world, before)
    return Cell("ends by SIGTERM; the exit task does not run", recorded, start_next_run(world), "nothing")


def exercise_retried(world: FaultWorld, task: RecordedTask) -> Cell:
    """The task fails, the exit task runs, then somebody presses Retry: the task and those after it run again."""
    before = world.list_stored()
    failed = world.once(f"{task.name}-failed", lambda: fail_and_record(world, task))
    again = world.run(task)
    for name in ("record_round", "end_round"):
        if list(world.tasks).index(name) > list(world.tasks).index(task.name) > list(world.tasks).index("start_round"):
            done = world.follow_on(name, partial(world.run, world.tasks[name]))
            assert done.code == 0, done.output[-2000:]
    happens = "fails; after Retry"
    return describe_success(world, task, again, happens, summarize(world, failed), describe_keys(world, before), True)


def exercise_cloned(world: FaultWorld, task: RecordedTask) -> Cell:
    """The task fails, the exit task runs, then somebody clones the run: another run with the same arguments."""
    before = world.list_stored()
    failed = world.once(f"{task.name}-failed", lambda: fail_and_record(world, task))
    following = start_next_run(world)
    again = world.run(task, values={world.run_id: NEXT_RUN})
    cell = describe_success(
        world, task, again, "fails; in the clone", summarize(world, failed), describe_keys(world, before)
    )
    return cell._replace(next_run=following)


FAULTS = (
    Fault("store away 60 s", exercise_outage({"store": 60.0})),
    Fault("store away 20 min", exercise_outage({"store": 1200.0})),
    Fault("judge 503 for 90 s", exercise_outage({"judge": 90.0}, 503)),
    Fault("judge 401", exercise_outage({"judge": 1e9}, 401)),
    Fault("API server away 60 s", exercise_outage({"cluster": 60.0})),
    Fault("pod killed", exercise_lost_pod("SIGKILL")),
    Fault("node drained", exercise_lost_pod("SIGTERM")),
    Fault("run terminated", exercise_terminated),
    Fault("run retried", exercise_retried),
    Fault("run cloned", exercise_cloned),
    Fault("disk full", exercise_full_disk),
    Fault("memory limit hit", exercise_memory_limit),
)


def exercise_cell(world: FaultWorld, fault: Fault, name: str) -> Cell:
    """Let one task meet one fault, from the state of the store that the round had left it."""
    task = world.tasks[name]
    world.find_stable_files(name)
    world.restore(task)
    return fault.exercise(world, task)


def end_by_signal(world: FaultWorld, task: RecordedTask, signal: str) -> None:
    """End the task by a signal while it writes its outputs."""
    attempt = world.once(f"{task.name}-{signal}", lambda: world.run(task, fault=signal))
    assert CODES.get(attempt.code) == signal, (attempt.code, attempt.output[-2000:])


def fail_and_record(world: FaultWorld, task: RecordedTask) -> Attempt:
    """Let the task fail while it writes its outputs, and the exit task record that."""
    world.plan.begin({})
    failed = world.run(task, fault="error")
    assert failed.code == 1, (failed.code, failed.output[-2000:])
    record_failure(world, task)
    return failed


def record_failure(world: FaultWorld, task: RecordedTask) -> None:
    """Run the exit task, which Kubeflow Pipelines starts however the run ends, except after Terminate."""
    if task.name == "record_run_status":
        return
    world.plan.move(world.plan.elapsed + EXIT_TASK_S)
    exit_task = world.tasks["record_run_status"]
    away = "away" if world.plan.is_away("store") else "there"
    done = world.follow_on(f"exit-{away}", lambda: world.run(exit_task, values={"SUCCEEDED": "FAILED"}))
    assert done.code == 0, done.output[-2000:]


def describe_failure(world: FaultWorld, task: RecordedTask, attempt: Attempt, before: set[str]) -> Cell:
    minutes = round(attempt.elapsed / 60)
    record_failure(world, task)
    return Cell(
        f"fails after {minutes} min" if minutes else "fails at once",
        describe_keys(world, before),
        start_next_run(world),
        summarize(world, attempt),
    )


def describe_success(
    world: FaultWorld,
    task: RecordedTask,
    attempt: Attempt,
    happens: str,
    told: str,
    recorded: str = "",
    ended: bool = False,
) -> Cell:
    assert attempt.code == 0, attempt.output[-3000:]
    same = world.made_the_same(task.name, attempt)
    happens += ": same result" if same else ": another result"
    return Cell(happens, recorded or "as without the fault", start_next_run(world) if ended else "—", told)


def describe_keys(world: FaultWorld, before: set[str]) -> str:
    """The records that are new in the store; other files of a checkpoint or version are counted."""
    new = sorted(world.list_stored() - before)
    records = [
        name.partition("platform/")[2] for name in new if re.search(r"(rounds|runs|unbegun|preflight)/tiny/", name)
    ]
    others = len(new) - len(records)
    text = ", ".join(f"`{record.replace(world.run_id, 'RUN').replace(NEXT_RUN, 'RUN')}`" for record in records)
    return ", ".join(filter(None, [text, format_count(others, "other object") if others else ""])) or "nothing"


def start_next_run(world: FaultWorld) -> str:
    """Start another run of the line; return what its first task says about the round. The store stays as it is."""
    world.plan.begin({})
    return world.follow_on("next-run", lambda: _start_next_run(world))


def _start_next_run(world: FaultWorld) -> str:
    world.store_settings()
    started = world.run(world.tasks["start_round"], values={world.run_id: NEXT_RUN})
    assert started.code == 0, started.output[-2000:]
    said = [line for line in started.output.splitlines() if line.startswith("round ")]
    return normalize(world, said[-1]) if said else "begins the round"


def find_waits(world: FaultWorld, attempt: Attempt) -> list[str]:
    """The first wait for each service."""
    lines = [normalize(world, line) for line in attempt.output.splitlines() if " is away (" in line]
    return sorted(dict.fromkeys(line for line in lines if "waiting 1 s" in line))


def summarize(world: FaultWorld, attempt: Attempt) -> str:
    lines = [line for line in attempt.output.splitlines() if line.startswith("clincot ")]
    return normalize(world, lines[-1] if lines else attempt.told)


def normalize(world: FaultWorld, text: str) -> str:
    """Replace what differs from run to run: folders, ports, digests, identifiers."""
    text = text.replace(str(world.folder), "…")
    text = re.sub(r"^\[KFP Executor [^\]]*\]: ", "", text)
    text = re.sub(rf"is away \({_NO_CONNECTION}\)", "is away (no connection)", text)
    text = re.sub(rf"{_NO_CONNECTION}: [^;]*?(?=; still away|$)", "no connection", text)
    text = re.sub(r"http://127\.0\.0\.1:\d+", "http://HOST", text)
    text = re.sub(r"\bround-\d{4}-[\d-]+", "RUN", text).replace(world.run_id, "RUN").replace(NEXT_RUN, "RUN")
    text = re.sub(r"files/md5/\w\w/", "files/md5/", text)
    text = re.sub(r"\b\d+ of \d+ checks", "some checks", text)
    text = re.sub(r"still away after 10 min \d+ s", "still away after 10 min", text)
    text = re.sub(r"/(run/kfp|outputs)/\S+?/(?=[\w.-]+\b)", "/", text)
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "…", text)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "…"


def render_page(cells: Mapping[tuple[str, str], Cell]) -> str:
    """The generated part of the page: a table for each fault, with one row for all tasks that fare alike."""
    parts = []
    for fault in FAULTS:
        rows: dict[Cell, list[str]] = {}
        for (title, name), cell in cells.items():
            if title == fault.title:
                rows.setdefault(cell, []).append(name)
        lines = [
            f"### {fault.title}",
            "",
            "| tasks | what happens | recorded | next run | log |",
            "|---|---|---|---|---|",
        ]
        for cell, names in rows.items():
            columns = (", ".join(f"`{name}`" for name in names), *(one.replace("|", "\\|") for one in cell))
            lines.append(f"| {' | '.join(columns)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def read_page() -> dict[tuple[str, str], Cell]:
    """The cells of the committed page."""
    cells: dict[tuple[str, str], Cell] = {}
    title = ""
    for line in PAGE.read_text(encoding="utf-8").partition(MARK)[2].splitlines():
        if line.startswith("### "):
            title = line.removeprefix("### ")
        elif line.startswith("| `"):
            names, *columns = (one.replace("\\|", "|") for one in re.split(r" (?<!\\)\| ", line.strip("| ")))
            for name in names.replace("`", "").split(", "):
                cells[title, name] = Cell(*columns)
    return cells


def exercise_all(world: FaultWorld, faults: Iterable[Fault] = FAULTS) -> dict[tuple[str, str], Cell]:
    cells = {}
    for fault in faults:
        for name in world.tasks:
            cells[fault.title, name] = exercise_cell(world, fault, name)
            print(f"{fault.title}, {name}: {cells[fault.title, name]}", file=sys.stderr, flush=True)
    return cells


def main() -> None:
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    with tempfile.TemporaryDirectory() as folder, build_fault_world(Path(folder)) as world:
        generated = render_page(exercise_all(world))
    PAGE.write_text(f"{head}{MARK}\n\n{generated}", encoding="utf-8")


if __name__ == "__main__":
    main()
