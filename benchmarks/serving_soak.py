"""Soak test of `clincot serve`: errors and memory over a long time with many different pictures.

    python -m benchmarks.serving_soak --seconds 600      (make soak, SOAK=seconds)

16 clients ask about 2,000 different pictures in turn. Memory is that of the server and its decode workers together,
measured 20 times a second. The server returns unused memory to the system every 20 s, so its memory goes up and down:
the time is divided into ten parts, and the highest memory of each counts. The time begins when every picture has been
asked about once: by then the largest cache, 256 MiB of features of which a picture's windows take about 0.3 MB, is full
and has replaced its entries, which fragments the heap until then. The run fails if a request is not answered, or if the
memory of the last five parts is more than a tenth above that of the first five. The memory while warming up is reported
too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.server_process import ROOT, ServerProcess, start_server
from benchmarks.serving_throughput import build_requests, run_clients

MAX_GROWTH = 0.10
PARTS = 10


def run_soak(
    checkpoint: Path, seconds: float, clients: int, films: int, overrides: Sequence[str] = (), log: Path | None = None
) -> dict[str, Any]:
    """Run clients for a while; returns the number of answers, and the highest memory in MiB of each part of the time.

    Raises httpx.HTTPStatusError at the first reply that is an error.
    """
    requests = build_requests(films, questions=1)
    patient = ("deadline_s=600", *overrides)  # errors are not to be about the machine's speed
    with start_server(checkpoint, overrides=patient, log=log) as server:
        warming, memory, answers = asyncio.run(_ask_in_parts(server, requests, clients, seconds))
    half = len(memory) // 2
    return {
        "seconds": seconds,
        "pictures": films,
        "answers": answers,
        "errors": 0,
        "warming_mib": [size >> 20 for size in warming],
        "memory_mib": [size >> 20 for size in memory],
        "peak_mib": max(warming + memory) >> 20,
        "growth": round(max(memory[half:]) / max(memory[:half]) - 1, 3),
        "load_average": os.getloadavg(),
    }


async def _ask_in_parts(
    server: ServerProcess, requests: list[dict[str, Any]], clients: int, seconds: float
) -> tuple[list[int], list[int], int]:
    """Highest bytes of each part of the time while warming up and from then on, and the number of answers."""
    warming: list[int] = []
    memory: list[int] = []
    answers = 0
    while len(memory) < PARTS:
        start = answers % len(requests)  # go on with the next picture
        rotated = requests[start:] + requests[:start]
        warmed_up = answers >= len(requests)
        server.peak = 0
        answers += len(await run_clients(server.url, rotated, clients=clients, seconds=seconds / PARTS))
        (memory if warmed_up else warming).append(server.peak)
        print(f"{answers} answers, at most {server.peak >> 20} MiB", file=sys.stderr)
    return warming, memory, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "assets" / "policy", help="Checkpoint to serve.")
    parser.add_argument("--seconds", type=float, default=600.0, help="Duration.")
    parser.add_argument("--clients", type=int, default=16, help="Number of clients.")
    parser.add_argument("--films", type=int, default=2000, help="Number of different pictures.")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="Setting of the server.")
    parser.add_argument("--log", type=Path, help="File for the server's log.")
    args = parser.parse_args()
    report = run_soak(args.checkpoint, args.seconds, args.clients, args.films, args.set, args.log)
    print(json.dumps(report, indent=2))
    if report["growth"] > MAX_GROWTH:
        sys.exit(f"the memory grew by {report['growth']:.0%} between the halves: expected at most {MAX_GROWTH:.0%}")


if __name__ == "__main__":
    main()
