"""A local pipeline, killed at ten random moments, and another whose S3 is away for 20 s: do the digests stay the same?

make bench-kills SEED=0
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clincot.data_repository.starting import start_repository
from tests.pipelines.local import World, build_world
from tests.s3_server import S3Server, s3_server

AWAY_S = 20.0
TASKS = ("prepare", "propose", "answer", "judge", "merge", "pair", "version", "train", "evaluate", "decide")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    rng = random.Random(parser.parse_args().seed)
    with (
        tempfile.TemporaryDirectory(prefix="clincot-kills-") as made,
        s3_server(Path(made) / "s3") as s3,
        door(s3) as (behind, away),
    ):
        os.environ.update(behind.environment)
        behind.bucket("preferences")
        start_repository(str(Path(made) / "preferences.git"), "s3://preferences/rounds")
        world = build_world(Path(made), behind, str(Path(made) / "preferences.git"))
        began = time.monotonic()
        _finished(world, "undisturbed")
        wall_s, wanted = time.monotonic() - began, world.made(line="undisturbed")
        killed = kills(world, rng)
        with_kills = world.made(line="killed") == wanted
        threading.Timer(rng.uniform(0.2, 0.6) * wall_s, away).start()
        _finished(world, "away")
        with_outage = world.made(line="away") == wanted
    print(f"undisturbed in {wall_s:.0f} s; killed in {', '.join(killed)}")
    print(f"killed {len(killed)} times: {'the same digests' if with_kills else 'OTHER DIGESTS'}")
    print(f"S3 away for {AWAY_S:g} s: {'the same digests' if with_outage else 'OTHER DIGESTS'}")
    return 0 if with_kills and with_outage else 1


def kills(world: World, rng: random.Random) -> list[str]:
    """Start the run again and again, and kill all of it (SIGKILL) a random while after a task began; let it finish."""
    done = [task for task in TASKS if world.kill_at("killed", task, line="killed", after_s=rng.uniform(0.0, 1.0))]
    _finished(world, "killed")
    return done


def _finished(world: World, run: str) -> None:
    done = world.run_local(run, line=run)
    if done.returncode != 0:
        raise SystemExit(f"{run}: {done.stderr[-3000:]}")


@contextmanager
def door(s3: S3Server) -> Iterator[tuple[S3Server, Callable[[], None]]]:
    """The server behind another address, and what shuts that for AWAY_S: connections break, new ones are refused."""
    target = ("127.0.0.1", int(s3.url.rpartition(":")[2]))
    listening = socket.create_server(("127.0.0.1", 0))
    port, open_ones, shut = listening.getsockname()[1], set[socket.socket](), threading.Event()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(1 << 16):
                sink.sendall(block)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                asking, _ = listening.accept()
            except OSError:
                return
            if shut.is_set():
                asking.close()
                continue
            answering = socket.create_connection(target)
            open_ones.update((asking, answering))
            for pair in ((asking, answering), (answering, asking)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    def away() -> None:
        shut.set()
        for one in list(open_ones):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        time.sleep(AWAY_S)
        shut.clear()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield S3Server(f"http://127.0.0.1:{port}"), away
    finally:
        listening.close()


if __name__ == "__main__":
    sys.exit(main())
