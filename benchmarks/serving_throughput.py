"""Throughput and latency of `clincot serve`, compared with the forward passes of its model.

    python -m benchmarks.serving_throughput          (make bench-serving)

For each number of clients, the same requests go to four servers of the same checkpoint, one server after the other:

    batched      as shipped, with as many threads as there are cores
    one by one   one request at a time (running=1); the regions of a request still share forward passes
    unbatched    one conversation at a time (max_batch=1), like a server without batching
    one thread   batched, but torch computes with one thread, as the floor does

Clients are closed loops: each sends its next request when its last one has been answered. They ask three questions
about every film (with --questions 1, one). Two of them look for the same finding, so their windows are scored once if
they are in one batch. No request is sent twice to a server and each number of clients has films of its own, so every
film and every window of it is encoded, as with patients. Every answer must equal the first answer of any server to that
request, or the run fails; if the likelihoods of two answers are within 1e-4, either is accepted.

`cpu` is the processor time per answer of the server and its decode workers, and `client` that of the clients. It
depends less than the rate on the machine's other load, so on a busy machine compare these columns.

The floor is the processor time per answer of the model's own forward passes (vision tower included) and nothing else.
Reading images, resizing, tokenizing, choosing regions, HTTP and JSON are above it. Since the processor time of several
threads includes what they wait for each other, it is that of the server of one thread. `timed_server.py` counts it in
the server itself, because a shared machine may be a third slower ten seconds later. The row `floor` shows what the same
passes take in this process, without a server: the chains of the first requests run on the same checkpoint, as many at a
time as there are clients, batched as in the server, and only the time within the model's modules counts.

`scored` and `written` are the conversations per answer that the model scored (p_yes) and replied to, and `batch` the
conversations in one call of the model; they show that server and floor do the same work.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from benchmarks.server_process import ROOT, ServerProcess, start_server
from benchmarks.timed_server import FORWARD_METRIC, ForwardTimer
from clincot.config.server_settings import ServeSettings
from clincot.generation.visual_cot import ImageQuestion, VisualAnswer, answer_question
from clincot.models.vlm import VisionLanguageModel
from clincot.records import Study
from clincot.serving.request_batching import Batcher
from clincot.serving.request_context import RequestContext

# {server: (settings, threads of torch; 0: as shipped)}
SERVER_VARIANTS: dict[str, tuple[tuple[str, ...], int]] = {
    "batched": ((), 0),
    "one by one": (("running=1", "waiting=64"), 0),
    "unbatched": (("max_batch=1",), 0),
    "one thread": ((), 1),
}
BATCH_SAMPLES = ("clincot_batch_size_count", "clincot_batch_size_sum")
QUESTIONS = ("Is there a nodule?", "Is there an effusion?", "Is there a nodule in the left lung?")


@dataclass(frozen=True)
class BenchRow:
    """One server at one number of clients."""

    done: list[tuple[float, int, Any]]  # latency in s, request, prediction
    rate: float  # answers a second
    cpu_ms: float  # of server and workers, per answer
    forward_ms: float  # within the model's forward passes, per answer
    client_ms: float
    p50_ms: float
    p99_ms: float
    work: ModelWork


@dataclass(frozen=True)
class ModelWork:
    """What the model was asked for, per answer."""

    scored: float  # conversations
    written: float
    batch: float  # conversations in one call

    @classmethod
    def from_counts(cls, counts: Mapping[str, Sequence[float]], answers: int) -> ModelWork:
        """counts: (calls, conversations) of each kind of call."""
        calls, conversations = (sum(column) for column in zip(*counts.values(), strict=True))
        return cls(counts["p_yes"][1] / answers, counts["write"][1] / answers, conversations / calls)

    def __str__(self) -> str:
        return f"{self.scored:>6.1f} {self.written:>7.2f} {self.batch:>5.0f}"


def build_requests(films: int, questions: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Build requests: the first `questions` of QUESTIONS about each of `films` images of noise with a bright square.

    Two seeds make different images.
    """
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


def measure_cpu_time(processes: Sequence[psutil.Process]) -> float:
    """Return the seconds of processor time of processes together."""
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


def answers_match(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compare two predictions: equal confidence to 1e-4, and equal answers or a tie of likelihoods."""
    same_confidence = abs(one["confidence"] - other["confidence"]) < 1e-4
    if one["answer"] == other["answer"]:
        return same_confidence
    likelihoods = [region["likelihood"] for region in (*one["regions"], *other["regions"])]
    return same_confidence and min(abs(a - b) for a, b in itertools.combinations(likelihoods, 2)) < 1e-4


def measure_row(server: ServerProcess, requests: Sequence[dict[str, Any]], clients: int, seconds: float) -> BenchRow:
    """Measure one server at one number of clients; exits where the requests do not last for `seconds`."""
    processes, before, forward = server.list_processes(), read_batch_counts(server.url), read_forward_time(server.url)
    started, cpu, own = time.monotonic(), measure_cpu_time(processes), measure_cpu_time([psutil.Process()])
    done = asyncio.run(run_clients(server.url, requests, clients=clients, seconds=seconds))
    elapsed = time.monotonic() - started
    if len(done) > len(requests):
        raise SystemExit(f"{len(done)} answers to {len(requests)} requests: expected no request twice; raise --films")
    cpu, own = measure_cpu_time(processes) - cpu, measure_cpu_time([psutil.Process()]) - own
    counts = {call: np.subtract(count, before[call]) for call, count in read_batch_counts(server.url).items()}
    p50, p99 = np.percentile([latency for latency, _, _ in done], [50, 99]) * 1000
    return BenchRow(
        done=done,
        rate=len(done) / elapsed,
        cpu_ms=1000 * cpu / len(done),
        forward_ms=1000 * (read_forward_time(server.url) - forward) / len(done),
        client_ms=1000 * own / len(done),
        p50_ms=float(p50),
        p99_ms=float(p99),
        work=ModelWork.from_counts(counts, len(done)),
    )


def read_batch_counts(url: str) -> dict[str, tuple[float, float]]:
    """(calls of the model, conversations in them) so far, by the kind of call, from a server's metrics."""
    counts = {"p_yes": [0.0, 0.0], "write": [0.0, 0.0]}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text):
        for sample in family.samples:
            if sample.name in BATCH_SAMPLES:
                counts[sample.labels["call"]][BATCH_SAMPLES.index(sample.name)] = sample.value
    return {call: (calls, conversations) for call, (calls, conversations) in counts.items()}


def read_forward_time(url: str) -> float:
    """Seconds of processor time within the model's forward passes so far, as timed_server.py counts them."""
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text):
        for sample in family.samples:
            if sample.name == FORWARD_METRIC:
                return float(sample.value)
    raise SystemExit(f"{url}/metrics has no {FORWARD_METRIC}")


def compare_servers(
    checkpoint: Path, requests: Mapping[int, Sequence[dict[str, Any]]], seconds: float, warm: Sequence[dict[str, Any]]
) -> dict[str, BenchRow]:
    """Measure all servers with {number of clients: their requests}; returns {"server/clients": row}."""
    table: dict[str, BenchRow] = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, (overrides, threads) in SERVER_VARIANTS.items():
            running[name] = stack.enter_context(
                start_server(
                    checkpoint,
                    overrides=("deadline_s=600", *overrides),
                    threads=threads,
                    module="benchmarks.timed_server",
                )
            )
        for server in running.values():
            asyncio.run(run_clients(server.url, warm, clients=4, seconds=seconds / 4))
        for count, asked in tqdm(requests.items(), desc="clients"):
            first: dict[int, Any] = {}
            for name, server in running.items():
                row = table[f"{name}/{count}"] = measure_row(server, asked, count, seconds)
                for _, which, answer in row.done:
                    if not answers_match(first.setdefault(which, answer), answer):
                        raise SystemExit(f"{name}, {count} clients: request {which} got another answer than before")
    return table


def measure_floor(
    checkpoint: Path, requests: Sequence[dict[str, Any]], clients: int, warm: Sequence[dict[str, Any]]
) -> tuple[float, ModelWork]:
    """Processor time in ms per answer of the model's forward passes, with the chains of `clients` requests together."""
    torch.set_num_threads(1)
    settings = ServeSettings()
    counts = {"p_yes": [0, 0], "write": [0, 0]}

    def count_batch(call: str, size: int, _: float) -> None:
        counts[call][0] += 1
        counts[call][1] += size

    model = VisionLanguageModel(checkpoint, batch_size=settings.max_batch)
    timer = ForwardTimer(model)
    batcher = Batcher(model, max_batch=settings.max_batch, gather_s=settings.gather_s, observe=count_batch)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(clients) as threads:
        asked = [save_question(request, Path(name), n) for n, request in enumerate([*warm, *requests])]

        def answer(question: ImageQuestion) -> VisualAnswer:
            with batcher.open_policy(RequestContext(600)) as policy:
                return answer_question(question, policy, settings)

        list(threads.map(answer, asked[: len(warm)]))
        timer.seconds = 0.0
        for count in counts.values():
            count[:] = [0, 0]
        list(threads.map(answer, asked[len(warm) :]))
        batcher.close()
    return 1000 * timer.seconds / len(requests), ModelWork.from_counts(counts, len(requests))


def save_question(request: dict[str, Any], folder: Path, number: int) -> ImageQuestion:
    """Write a request's image into the folder, for a chain without a server."""
    instance = request["instances"][0]
    encoded = base64.b64decode(instance["image"].partition(",")[2])
    (folder / f"{number}.png").write_bytes(encoded)
    width, height = Image.open(folder / f"{number}.png").size
    study = Study(image=f"{number}.png", sha256=hashlib.sha256(encoded).hexdigest(), width=width, height=height)
    return ImageQuestion(study, folder, instance["question"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "assets" / "policy", help="Checkpoint to serve.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="Numbers of clients.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Duration of each measurement.")
    parser.add_argument("--films", type=int, default=256, help="Images for each number of clients.")
    parser.add_argument("--questions", type=int, choices=[1, 2, 3], default=3, help="Questions per image.")
    args = parser.parse_args()
    warm = build_requests(8, args.questions, seed=0)
    requests = {count: build_requests(args.films, args.questions, seed=count) for count in args.clients}
    table = compare_servers(args.checkpoint, requests, args.seconds, warm)
    print(
        f"{'clients':>7}  {'server':<11} {'answers/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'cpu ms':>7} {'client':>6} "
        f"{'scored':>6} {'written':>7} {'batch':>5}  speed-up of batched (in cpu)"
    )
    for count in args.clients:
        batched = table[f"batched/{count}"]
        for name in SERVER_VARIANTS:
            row = table[f"{name}/{count}"]
            faster, cheaper = batched.rate / row.rate, row.cpu_ms / batched.cpu_ms
            print(
                f"{count:>7}  {name:<11} {row.rate:>9.1f} {row.p50_ms:>8.0f} {row.p99_ms:>8.0f} {row.cpu_ms:>7.1f} "
                f"{row.client_ms:>6.1f} {row.work}  {faster:.2f}x ({cheaper:.2f}x)"
            )
        floor, work = measure_floor(args.checkpoint, requests[count][: 8 * count + 32], count, warm)
        print(f"{count:>7}  {'floor':<11} {floor:>35.1f} {'':>6} {work}")
        single = table[f"one thread/{count}"]
        share = f"{single.cpu_ms / single.forward_ms:.2f}x of its own forward passes ({single.forward_ms:.1f} ms)"
        print(f"{count:>7}  the server of one thread takes {single.cpu_ms:.1f} ms, {share}")


if __name__ == "__main__":
    main()
