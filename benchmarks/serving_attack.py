"""Attack a server that runs under the chart's memory limit, beside clients that ask it honest questions.

    python -m benchmarks.serving_attack              (make attack)

16 clients ask in closed loops, first alone, then while four attackers go through all attacks again and again. The run
fails if the server is killed, if an honest request is not answered or answered otherwise than alone, if the
99th percentile of the honest latencies is more than three times that of the clients alone, or if an attack gets another
reply than it must.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.attack_requests import Attack, Target, iter_attacks
from benchmarks.server_process import ROOT, ServerProcess, read_chart_limit, start_server
from benchmarks.serving_throughput import answers_match, build_requests

MAX_SLOWDOWN = 3.0
ATTACKERS = 4


@dataclass(frozen=True)
class HonestResult:
    """What honest clients saw."""

    latencies_s: list[float]
    errors: Counter[str]

    def percentile(self, percent: float) -> float:
        """A percentile of the latencies, in seconds."""
        return float(np.percentile(self.latencies_s, percent))


async def ask_honestly(
    url: str, requests: Sequence[dict[str, Any]], expected: dict[int, Any], *, clients: int, until: asyncio.Event
) -> HonestResult:
    """Ask in closed loops until the event; an answer must match the first one to the same request, in `expected`."""
    latencies: list[float] = []
    errors: Counter[str] = Counter()
    order = itertools.count()

    async def ask(http: httpx.AsyncClient) -> None:
        while not until.is_set():
            which = next(order) % len(requests)
            began = time.monotonic()
            try:
                reply = await http.post(f"{url}/v1/models/policy:predict", json=requests[which])
            except httpx.HTTPError as error:
                errors[type(error).__name__] += 1
                await asyncio.sleep(0.1)
                continue
            latencies.append(time.monotonic() - began)
            if reply.status_code != 200:
                errors[f"status {reply.status_code}"] += 1
            elif not answers_match(expected.setdefault(which, reply.json()["predictions"][0]), _read_answer(reply)):
                errors["another answer"] += 1

    async with httpx.AsyncClient(timeout=120) as http, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(ask(http))
    return HonestResult(latencies, errors)


def _read_answer(reply: httpx.Response) -> dict[str, Any]:
    answer: dict[str, Any] = reply.json()["predictions"][0]
    return answer


async def run_attacks(
    attacks: Sequence[Attack], target: Target, seconds: float, seed: int = 0
) -> tuple[Counter[str], dict[str, str]]:
    """Run every attack at least once, and all of them again for `seconds`; (counts by name, wrong outcomes by name)."""
    attacks = random.Random(seed).sample(attacks, len(attacks))
    counts: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    until = time.monotonic() + seconds
    rounds = itertools.cycle(attacks)
    started = itertools.count()

    async def attack() -> None:
        while next(started) < len(attacks) or time.monotonic() < until:
            chosen = next(rounds)
            outcome = await _run_attack(chosen, target)
            counts[chosen.name] += 1
            if outcome:
                wrong[chosen.name] = outcome

    async with asyncio.TaskGroup() as group:
        for _ in range(ATTACKERS):
            group.create_task(attack())
    return counts, wrong


async def _run_attack(attack: Attack, target: Target) -> str:
    """What was wrong with the outcome of an attack; "" if it was as it must be."""
    try:
        statuses = await attack.run(target)
    except TimeoutError:
        return "neither answered nor closed"
    except OSError as error:
        return f"no connection: {type(error).__name__}"
    return "" if statuses <= attack.accepted else f"status {sorted(statuses - attack.accepted)}"


def attack_in_process(pipe: Connection, target: Target, seconds: float) -> None:
    """Body of the attackers' process, whose work must not slow the honest clients' measurement.

    Builds all attacks first and tells so; starts when it is told to; sends the outcome.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, files[1]), files[1]))
    attacks = list(iter_attacks())
    for attack in attacks:
        attack.build()
    pipe.send("ready")
    pipe.recv()
    pipe.send(asyncio.run(run_attacks(attacks, target, seconds)))


async def measure(server: ServerProcess, clients: int, alone_s: float, seconds: float) -> dict[str, Any]:
    """Measure honest clients alone and under attack; returns the report."""
    requests = build_requests(16)
    honest = json.dumps(requests[0]).encode()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    target = Target("127.0.0.1", server.port, honest)
    attackers = context.Process(target=attack_in_process, args=(theirs, target, seconds), daemon=True)
    attackers.start()
    await asyncio.to_thread(ours.recv)
    expected: dict[int, Any] = {}
    await _ask_for(server.url, requests, expected, clients, alone_s / 3)  # warm
    before = server.measure_memory()
    alone = await _ask_for(server.url, requests, expected, clients, alone_s)
    ours.send("go")
    stop = asyncio.Event()
    asking = asyncio.create_task(ask_honestly(server.url, requests, expected, clients=clients, until=stop))
    counts, wrong = await asyncio.to_thread(ours.recv)
    stop.set()
    attacked = await asking
    attackers.join()
    return {
        "attacks": len(counts),
        "attack_requests": sum(counts.values()),
        "wrong_outcomes": wrong,
        "killed": server.kills or int(server.process.poll() is not None),
        "honest_alone": _describe(alone),
        "honest_attacked": _describe(attacked),
        "slowdown_p99": round(attacked.percentile(99) / alone.percentile(99), 2),
        "memory_mib": {
            "limit": server.limit >> 20,
            "before": before >> 20,
            "peak": server.peak >> 20,
            "after": server.measure_memory() >> 20,
        },
        "load_average": os.getloadavg(),
    }


async def _ask_for(
    url: str, requests: Sequence[dict[str, Any]], expected: dict[int, Any], clients: int, seconds: float
) -> HonestResult:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    return await ask_honestly(url, requests, expected, clients=clients, until=stop)


def _describe(result: HonestResult) -> dict[str, Any]:
    return {
        "answers": len(result.latencies_s),
        "errors": dict(result.errors),
        "p50_ms": round(1000 * result.percentile(50)),
        "p99_ms": round(1000 * result.percentile(99)),
    }


def find_failures(report: dict[str, Any]) -> list[str]:
    """What a report shows that must not be."""
    failures = [f"{name}: {outcome}" for name, outcome in report["wrong_outcomes"].items()]
    if report["killed"]:
        failures.append("the server was killed")
    phases = [phase for phase in ("honest_alone", "honest_attacked") if report[phase]["errors"]]
    failures += [f"{phase}: {report[phase]['errors']}" for phase in phases]
    if report["slowdown_p99"] > MAX_SLOWDOWN:
        failures.append(f"p99 of honest clients is {report['slowdown_p99']} times that of the clients alone")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "assets" / "policy", help="Checkpoint to serve.")
    parser.add_argument("--clients", type=int, default=16, help="Number of honest clients.")
    parser.add_argument("--alone", type=float, default=30.0, help="Seconds of the clients alone.")
    parser.add_argument("--seconds", type=float, default=120.0, help="Seconds of the attacks.")
    parser.add_argument("--log", type=Path, help="File for the server's log.")
    args = parser.parse_args()
    with start_server(args.checkpoint, limit=read_chart_limit(), log=args.log) as server:
        report = asyncio.run(measure(server, args.clients, args.alone, args.seconds))
    failures = find_failures(report)
    print(json.dumps(report, indent=2))
    print("\n".join(failures) or f"passed: {report['attacks']} attacks, {report['attack_requests']} requests")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
