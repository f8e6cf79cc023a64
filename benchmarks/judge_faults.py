"""What the faults of a judge's endpoint cost a panel: time, requests and scores.

    python -m benchmarks.judge_faults          (make bench-judges)

A panel of one judge scores the same candidates at two local HTTP servers, one after the other in this run: one that
answers every request after --latency seconds, and one that also fails, with the shares of the table: 503 while a pod
restarts, 429 with `Retry-After: 1`, and requests that are never answered. The judge's settings are those of the recipes
(60 s timeout, batches of 128). The ideal time is that at the healthy server; candidates x latency / concurrency, which
leaves out the work of client and server, is printed as well.

The run fails if a candidate has no score, if a score differs between the servers, or if the faults cost 1.3 times the
ideal time or more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from clincot.config import JudgeConfig, JudgeSpec
from clincot.jsonl import read_records
from clincot.judging.asking import JudgeRequest
from clincot.judging.panel import judge_candidates
from clincot.models.endpoint import build_endpoint_judge
from clincot.records import Judgement
from clincot.text import markdown_table
from tests.support.chat_endpoint import StandIn
from tests.support.judging_builders import BRIGHT, half_and_half

MAX_RATIO = 1.3
FAULTS = {"busy_503": 0.02, "limited_429": 0.05, "hanging": 0.01}


@dataclass(frozen=True)
class PanelRun:
    """The time and the scores of one panel, and what its server counted."""

    wall_s: float
    scores: list[float | None]
    posts: int
    failed: int


def judge_once(server: StandIn, *, candidates: int, concurrency: int) -> PanelRun:
    """Score the candidates with one judge, an endpoint with this server's habits."""
    with tempfile.TemporaryDirectory() as name, server.serve():
        folder = Path(name)
        study = half_and_half(folder)
        requests = [
            JudgeRequest(f"candidate-{number}", study, f"Is number {number} bright?", BRIGHT, "yes")
            for number in range(candidates)
        ]
        spec = JudgeSpec(name="remote", url=server.url, concurrency=concurrency)
        config = JudgeConfig(judges=(spec,), quorum=1, calibration="identity")
        start = time.monotonic()
        judge_candidates(
            [build_endpoint_judge(spec)],
            requests,
            config,
            folder=folder,
            judgements_path=folder / "judgements.jsonl",
            scores_path=folder / "scores.jsonl",
        )
        wall_s = time.monotonic() - start
        scores = [judgement.score for judgement in read_records(folder / "judgements.jsonl", Judgement)]
    return PanelRun(wall_s, scores, len(server.posts), len(server.tripped))


def measure(*, candidates: int, concurrency: int, latency_s: float, seed: int) -> int:
    """Print the table; return the exit code."""
    waiting_s = candidates * latency_s / concurrency
    healthy = judge_once(StandIn(latency_s=latency_s), candidates=candidates, concurrency=concurrency)
    server = StandIn(latency_s=latency_s, retry_after="1", seed=seed, **FAULTS)
    faulty = judge_once(server, candidates=candidates, concurrency=concurrency)
    rows = [
        (
            name,
            f"{run.wall_s:.1f}",
            f"{run.wall_s / healthy.wall_s:.2f}",
            f"{run.wall_s / waiting_s:.2f}",
            str(run.posts),
            str(run.failed),
            str(run.scores.count(None)),
        )
        for name, run in (("healthy", healthy), ("2 % 503, 5 % 429, 1 % hang", faulty))
    ]
    print(f"{candidates} candidates, {concurrency} at a time, {latency_s} s each: {waiting_s:.1f} s without any work")
    print(markdown_table(("server", "s", "of ideal", "of waiting alone", "posts", "failed", "without a score"), rows))
    return int(faulty.scores != healthy.scores or None in faulty.scores or faulty.wall_s >= MAX_RATIO * healthy.wall_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1600)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    return measure(candidates=args.candidates, concurrency=args.concurrency, latency_s=args.latency, seed=args.seed)


if __name__ == "__main__":
    sys.exit(main())
