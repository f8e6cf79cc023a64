"""A local pipeline, killed at ten random moments, and another whose S3 is away for 20 s: do the digests stay the same?

make bench-kills SEED=0

The kills (SIGKILL, of all its processes) fall into ten tasks, one each, a random while after the task began; the run is
started again after each. S3 goes away when `version` begins, which pushes to it; what it refused is counted.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from clincot.preferences.versions.init import init_repository
from tests.support.local_pipeline import World, build_world
from tests.support.s3_server import S3Server, s3_server

OUTAGE_S = 20.0
KILLS = 10
UNKILLED_TASKS = ("preflight", "start-round", "record-round", "record-run-status")  # run anew each time, so a kill proves nothing
OUTAGE_TASK = "version"
_TASK_START_PATTERN = re.compile(r"(\d\d):(\d\d):(\d\d\.\d+) - INFO - Executing task \S*?'([a-z0-9-]+)'")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    rng = random.Random(parser.parse_args().seed)
    with (
        tempfile.TemporaryDirectory(prefix="clincot-kills-") as made,
        s3_server(Path(made) / "s3") as s3,
        start_tcp_proxy(s3) as (behind, away, refused),
    ):
        os.environ.update(behind.environment)
        behind.bucket("preferences")
        init_repository(str(Path(made) / "preferences.git"), "s3://preferences/rounds")
        world = build_world(Path(made), behind, str(Path(made) / "preferences.git"))
        began = time.monotonic()
        took = parse_durations(_run_to_end(world, "undisturbed"))
        wall_s, wanted = time.monotonic() - began, world.made(line="undisturbed")
        print(
            f"undisturbed in {wall_s:.0f} s: {', '.join(f'{task} {s:.1f} s' for task, s in took.items())}", flush=True
        )
        killed = run_with_kills(world, took, rng)
        with_kills = world.made(line="killed") == wanted
        print(
            f"killed {len(killed)} of {KILLS} times, {_describe_digests(with_kills)}: {', '.join(killed)}", flush=True
        )
        again = run_with_outage(world, away)
        with_outage = world.made(line="away") == wanted
    print(
        f"S3 away for {OUTAGE_S:g} s from {OUTAGE_TASK} on, {len(refused)} connections refused, the pipeline started again "
        f"{again} times, {_describe_digests(with_outage)}"
    )
    return 0 if with_kills and with_outage and len(killed) == KILLS and refused else 1


def parse_durations(output: str) -> dict[str, float]:
    """{task: seconds until the next one began}, of a run's tasks in their order, without the spared ones."""
    begun = [
        (one[4], float(one[1]) * 3600 + float(one[2]) * 60 + float(one[3]))
        for one in _TASK_START_PATTERN.finditer(output)
    ]
    gaps = {task: (after - at) % 86400 for (task, at), (_, after) in itertools.pairwise(begun)}
    return {task: gap for task, gap in gaps.items() if task not in UNKILLED_TASKS}


def run_with_kills(world: World, took: Mapping[str, float], rng: random.Random) -> list[str]:
    """Start the run again and again, each time killing it in a task where it was not killed yet; then let it finish."""
    chosen = set(rng.sample(sorted(took), KILLS))
    done = []

    def kill(task: str, group: int) -> bool:
        if task not in chosen:
            return False
        after_s = rng.uniform(0.0, 0.4) * took[task]  # undisturbed; `version` is faster where another run has pushed
        time.sleep(after_s)
        os.killpg(group, signal.SIGKILL)
        chosen.remove(task)
        done.append(f"{task} +{after_s:.1f} s")
        return True

    while chosen and world.watched("killed", kill, line="killed")[0] == -signal.SIGKILL:
        pass
    _run_to_end(world, "killed")
    return done


def run_with_outage(world: World, away: Callable[[], None]) -> int:
    """A run during which S3 is away; how often it was started again (what a task itself tries again is not seen)."""

    def leave(task: str, _: int) -> bool:
        if task == OUTAGE_TASK:
            threading.Thread(target=away, daemon=True).start()
        return task == OUTAGE_TASK

    code, said = world.watched("away", leave, line="away")
    if code != 0:
        raise SystemExit(f"away: {said[-3000:]}")
    return said.count("; again in ")


def _run_to_end(world: World, run: str) -> str:
    done = world.run_local(run, line=run)
    if done.returncode != 0:
        raise SystemExit(f"{run}: {done.stderr[-3000:]}")
    return done.stdout + done.stderr


def _describe_digests(same: bool) -> str:
    return "the same digests" if same else "OTHER DIGESTS"


@contextmanager
def start_tcp_proxy(s3: S3Server) -> Iterator[tuple[S3Server, Callable[[], None], list[float]]]:
    """The server behind another address, and what shuts that for AWAY_S: connections break, new ones are refused, at
    the times in the list."""
    refused: list[float] = []
    target = ("127.0.0.1", int(s3.url.rpartition(":")[2]))
    listening = socket.create_server(("127.0.0.1", 0))
    port, open_ones, shut = listening.getsockname()[1], set[socket.socket](), threading.Event()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(1 << 16):
                sink.sendall(block)
        _close_connections(source, sink)

    def accept() -> None:
        while True:
            try:
                asking, _ = listening.accept()
            except OSError:
                return
            if shut.is_set():
                refused.append(time.monotonic())
                asking.close()
                continue
            answering = socket.create_connection(target)
            open_ones.update((asking, answering))
            if shut.is_set():  # it went away while this one came in
                _close_connections(asking, answering)
                continue
            for pair in ((asking, answering), (answering, asking)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    def away() -> None:
        shut.set()
        _close_connections(*open_ones.copy())
        time.sleep(OUTAGE_S)
        shut.clear()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield S3Server(f"http://127.0.0.1:{port}"), away, refused
    finally:
        listening.close()


def _close_connections(*connections: socket.socket) -> None:
    for one in connections:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    sys.exit(main())
