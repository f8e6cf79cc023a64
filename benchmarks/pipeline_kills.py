"""Crash safety of a local pipeline: ten kills at random moments, and an S3 outage of 20 s.

    python -m benchmarks.pipeline_kills --seed 0            (make bench-kills SEED=0)

One run is killed (SIGKILL to its process group) in each of ten tasks, at a random time after the task's start, and
started again after each kill. In another run, S3 is unreachable for 20 s from the start of `version`, which pushes to
it. Both must end with the digests of an undisturbed run. The exit code is 0 if they do, all ten kills took place and
S3 refused at least one connection.
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
# run anew each time, so a kill in them proves nothing
UNKILLED_TASKS = ("preflight", "start-round", "record-round", "end-round", "record-run-status")
OUTAGE_TASK = "version"
_TASK_START_PATTERN = re.compile(r"(\d\d):(\d\d):(\d\d\.\d+) - INFO - Executing task \S*?'([a-z0-9-]+)'")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the tasks and times of the kills.")
    rng = random.Random(parser.parse_args().seed)
    with (
        tempfile.TemporaryDirectory(prefix="clincot-kills-") as scratch,
        s3_server(Path(scratch) / "s3") as s3,
        start_tcp_proxy(s3) as (proxied_s3, cut_connections, refused),
    ):
        os.environ.update(proxied_s3.environment)
        proxied_s3.bucket("preferences")
        init_repository(str(Path(scratch) / "preferences.git"), "s3://preferences/rounds")
        world = build_world(Path(scratch), proxied_s3, str(Path(scratch) / "preferences.git"))
        started = time.monotonic()
        durations = parse_durations(_run_to_end(world, "undisturbed"))
        wall_s, expected = time.monotonic() - started, world.made(line="undisturbed")
        listed = ", ".join(f"{task} {seconds:.1f} s" for task, seconds in durations.items())
        print(f"undisturbed in {wall_s:.0f} s: {listed}", flush=True)
        killed = run_with_kills(world, durations, rng)
        with_kills = world.made(line="killed") == expected
        print(
            f"killed {len(killed)} of {KILLS} times, {_describe_digests(with_kills)}: {', '.join(killed)}", flush=True
        )
        restarts = run_with_outage(world, cut_connections)
        with_outage = world.made(line="away") == expected
    print(
        f"S3 unreachable for {OUTAGE_S:g} s from the start of {OUTAGE_TASK}, {len(refused)} connections refused, "
        f"pipeline restarted {restarts} times, {_describe_digests(with_outage)}"
    )
    return 0 if with_kills and with_outage and len(killed) == KILLS and refused else 1


def parse_durations(output: str) -> dict[str, float]:
    """Return {task: seconds until the next task started} in task order, without UNKILLED_TASKS."""
    starts = [
        (match[4], float(match[1]) * 3600 + float(match[2]) * 60 + float(match[3]))
        for match in _TASK_START_PATTERN.finditer(output)
    ]
    # The log has times without dates, hence the modulo for a run over midnight.
    gaps = {task: (after - start) % 86400 for (task, start), (_, after) in itertools.pairwise(starts)}
    return {task: gap for task, gap in gaps.items() if task not in UNKILLED_TASKS}


def run_with_kills(world: World, durations: Mapping[str, float], rng: random.Random) -> list[str]:
    """Start a run repeatedly, kill it each time in another task, then let it finish; returns the kills as text."""
    chosen = set(rng.sample(sorted(durations), KILLS))
    kills = []

    def kill(task: str, group: int) -> bool:
        if task not in chosen:
            return False
        after_s = (
            rng.uniform(0.0, 0.4) * durations[task]
        )  # early, because `version` is faster once another run has pushed
        time.sleep(after_s)
        os.killpg(group, signal.SIGKILL)
        chosen.remove(task)
        kills.append(f"{task} +{after_s:.1f} s")
        return True

    while chosen and world.watched("killed", kill, line="killed")[0] == -signal.SIGKILL:
        pass
    _run_to_end(world, "killed")
    return kills


def run_with_outage(world: World, cut_connections: Callable[[], None]) -> int:
    """Run with an S3 outage; returns how often the pipeline was restarted (retries within a task do not count)."""

    def start_outage(task: str, _: int) -> bool:
        if task == OUTAGE_TASK:
            threading.Thread(target=cut_connections, daemon=True).start()
        return task == OUTAGE_TASK

    code, output = world.watched("away", start_outage, line="away")
    if code != 0:
        raise SystemExit(f"away: {output[-3000:]}")
    return output.count("; again in ")


def _run_to_end(world: World, run: str) -> str:
    done = world.run_local(run, line=run)
    if done.returncode != 0:
        raise SystemExit(f"{run}: {done.stderr[-3000:]}")
    return done.stdout + done.stderr


def _describe_digests(same: bool) -> str:
    return "same digests" if same else "DIFFERENT DIGESTS"


@contextmanager
def start_tcp_proxy(s3: S3Server) -> Iterator[tuple[S3Server, Callable[[], None], list[float]]]:
    """Start a TCP proxy in front of the S3 server.

    Yields the server at the proxy's address, a function that breaks all connections and refuses new ones for OUTAGE_S,
    and the list of the times of refused connections.
    """
    refused: list[float] = []
    target = ("127.0.0.1", int(s3.url.rpartition(":")[2]))
    listening = socket.create_server(("127.0.0.1", 0))
    port, connections, shut = listening.getsockname()[1], set[socket.socket](), threading.Event()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(1 << 16):
                sink.sendall(block)
        _close_connections(source, sink)

    def accept() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            if shut.is_set():
                refused.append(time.monotonic())
                client.close()
                continue
            upstream = socket.create_connection(target)
            connections.update((client, upstream))
            if shut.is_set():  # the outage began while this connection was opened
                _close_connections(client, upstream)
                continue
            for pair in ((client, upstream), (upstream, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    def cut_connections() -> None:
        shut.set()
        _close_connections(*connections.copy())
        time.sleep(OUTAGE_S)
        shut.clear()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield S3Server(f"http://127.0.0.1:{port}"), cut_connections, refused
    finally:
        listening.close()


def _close_connections(*connections: socket.socket) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    sys.exit(main())
