"""Throughput and latency of `clincot serve`, and a soak test.

    python -m benchmarks.serving_throughput                1, 4, 16 and 64 clients, batched and unbatched servers
    python -m benchmarks.serving_throughput --soak 600     16 clients for ten minutes: errors, and RSS at both ends

    (make bench-serving, make bench-serving SOAK=600)

For each number of clients, the same requests go to three servers of the same checkpoint, one server after the other:

    batched      as shipped
    one by one   one request at a time (running=1); the regions of a request still share forward passes
    unbatched    one conversation at a time (max_batch=1), like a server without batching

Clients are closed loops: each sends its next request when its last one has been answered. They ask three questions
about every film (with --questions 1, one). Two of them look for the same finding, so their windows are scored once if
they are in one batch. There are more requests than clients, so no request is in flight twice. Every film is in the
servers' image caches before the measurement. Every answer must equal the first answer of any server to that request,
or the run fails; if the likelihoods of two answers are within 1e-4, either is accepted.

`cpu` is the processor time of server and clients per answer. It does not depend on the machine's other load, so on a
busy machine compare this column.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SERVER_VARIANTS = {"batched": (), "one by one": ("running=1", "waiting=64"), "unbatched": ("max_batch=1",)}
QUESTIONS = ("Is there a nodule?", "Is there an effusion?", "Is there a nodule in the left lung?")


def build_requests(films: int, questions: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Build requests: the first `questions` of QUESTIONS about each of `films` images of noise with a bright square."""
    rng = np.random.default_rng(seed)
    out = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(films):
            pixels = rng.integers(10, 90, (256, 256)).astype(np.uint8)
            x, y = rng.integers(8, 200, 2)
            pixels[y : y + 40, x : x + 40] = 220
            path = Path(folder) / f"{number}.png"
            Image.fromarray(pixels).save(path)
            image = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            out += [{"instances": [{"question": question, "image": image}]} for question in QUESTIONS[:questions]]
    return out


@contextlib.contextmanager
def start_server(checkpoint: Path, overrides: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Start a server and yield (address, process id) when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "clincot.cli.app", "serve", "--checkpoint", str(checkpoint), "--port", str(port)]
    command += [
        "--model-name",
        "policy",
        "--set",
        "deadline_s=600",
        *itertools.chain.from_iterable(("--set", override) for override in overrides),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TQDM_DISABLE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/v2/health/ready").status_code == 200:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"the server exited with code {process.returncode}: {' '.join(command)}")
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(timeout=120)


async def run_clients(
    url: str, requests: Sequence[dict[str, Any]], *, clients: int, seconds: float
) -> list[tuple[float, int, Any]]:
    """Send requests from closed loops for `seconds`; returns (latency in s, index of the request, prediction)."""
    done: list[tuple[float, int, Any]] = []
    until = time.monotonic() + seconds
    order = itertools.count()

    async def client(http: httpx.AsyncClient) -> None:
        while time.monotonic() < until:
            which = next(order) % len(requests)
            started = time.monotonic()
            reply = await http.post(f"{url}/v1/models/policy:predict", json=requests[which])
            reply.raise_for_status()
            done.append((time.monotonic() - started, which, reply.json()["predictions"][0]))

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client(http))
    return done


async def warm_image_cache(url: str, requests: Sequence[dict[str, Any]]) -> None:
    """Send every request once, so that the server has all images in its cache."""
    async with httpx.AsyncClient(timeout=600) as http:
        for request in requests:
            (await http.post(f"{url}/v1/models/policy:predict", json=request)).raise_for_status()


def measure_cpu_time(process: psutil.Process) -> float:
    """Return the seconds of processor time of a server and this process together."""
    total = 0.0
    for measured in (process, psutil.Process()):
        times = measured.cpu_times()
        total += times.user + times.system
    return total


def answers_match(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compare two predictions: equal confidence to 1e-4, and equal answers or a tie of likelihoods."""
    same_confidence = abs(one["confidence"] - other["confidence"]) < 1e-4
    if one["answer"] == other["answer"]:
        return same_confidence
    likelihoods = [region["likelihood"] for region in (*one["regions"], *other["regions"])]
    return same_confidence and min(abs(a - b) for a, b in itertools.combinations(likelihoods, 2)) < 1e-4


def compare_servers(
    checkpoint: Path, clients: Sequence[int], seconds: float, films: int, questions: int
) -> dict[str, Any]:
    """Measure all servers at each number of clients; returns {"server/clients": rate, cpu, p50, p99 and count}."""
    requests = build_requests(films, questions)
    if len(requests) < max(clients):
        raise SystemExit(
            f"{len(requests)} requests for {max(clients)} clients: expected at least one per client; raise --films"
        )
    first: dict[int, Any] = {}
    table: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(start_server(checkpoint, o)) for name, o in SERVER_VARIANTS.items()}
        for url, _ in running.values():
            asyncio.run(warm_image_cache(url, requests[::questions]))
        for count in tqdm(clients, desc="clients"):
            for name, (url, pid) in running.items():
                started, cpu = time.monotonic(), measure_cpu_time(psutil.Process(pid))
                done = asyncio.run(run_clients(url, requests, clients=count, seconds=seconds))
                elapsed, cpu = time.monotonic() - started, measure_cpu_time(psutil.Process(pid)) - cpu
                for _, which, answer in done:
                    if not answers_match(first.setdefault(which, answer), answer):
                        raise SystemExit(f"{name}, {count} clients: request {which} got another answer than before")
                latency = np.array([seconds for seconds, _, _ in done])
                p50, p99 = np.percentile(latency, [50, 99]) * 1000
                table[f"{name}/{count}"] = {
                    "rate": len(done) / elapsed,
                    "cpu_ms": cpu / len(done) * 1000,
                    "p50_ms": p50,
                    "p99_ms": p99,
                    "n": len(done),
                }
    return table


def run_soak(checkpoint: Path, seconds: float, clients: int, films: int) -> dict[str, Any]:
    """Run clients for a while; returns RSS after a tenth of the time, when caches are warm, and at the end.

    Raises httpx.HTTPStatusError at the first reply that is an error.
    """
    requests = build_requests(films)
    with start_server(checkpoint, ()) as (url, pid):
        process = psutil.Process(pid)
        warm = asyncio.run(run_clients(url, requests, clients=clients, seconds=seconds / 10))
        begin = process.memory_info().rss
        done = asyncio.run(run_clients(url, requests, clients=clients, seconds=seconds * 9 / 10))
        end = process.memory_info().rss
    return {"answers": len(warm) + len(done), "errors": 0, "rss_mb": [begin / 2**20, end / 2**20]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "assets" / "policy", help="Checkpoint to serve.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="Numbers of clients.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Duration of each measurement.")
    parser.add_argument("--films", type=int, default=32, help="Number of images.")
    parser.add_argument("--questions", type=int, choices=[1, 2, 3], default=3, help="Questions per image.")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="Run the soak test for this time instead.")
    args = parser.parse_args()
    if args.soak:
        print(json.dumps(run_soak(args.checkpoint, args.soak, 16, args.films), indent=2))
        return
    table = compare_servers(args.checkpoint, args.clients, args.seconds, args.films, args.questions)
    print(
        f"{'clients':>7}  {'server':<11} {'answers/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'cpu ms':>7}  "
        "speed-up of batched (in cpu)"
    )
    for count in args.clients:
        batched = table[f"batched/{count}"]
        for name in SERVER_VARIANTS:
            row = table[f"{name}/{count}"]
            faster, cheaper = batched["rate"] / row["rate"], row["cpu_ms"] / batched["cpu_ms"]
            print(
                f"{count:>7}  {name:<11} {row['rate']:>9.1f} {row['p50_ms']:>8.0f} {row['p99_ms']:>8.0f} "
                f"{row['cpu_ms']:>7.1f}  {faster:.2f}x ({cheaper:.2f}x)"
            )


if __name__ == "__main__":
    main()
