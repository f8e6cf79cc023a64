"""Do the reported 95 % intervals cover 95 %? Simulated benchmarks of known truth, the library's own intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.simulated_rounds import Setting, derive_paired_answers, draw_uniforms
from clincot.evaluation.intervals import MIN_RELIABLE_CLUSTERS, ClusterSums

CLUSTER_COUNTS = (40, 80, 300)  # clusters
LOW, HIGH = 0.93, 0.97
HALLUCINATION_RATE = 0.1
GAIN, DISCORDANCE, SKILL = 0.03, 0.15, 0.6
F1_MEAN = SKILL + (1 - SKILL) * 0.3 * 0.5  # right: 1; wrong: .5 in three of ten
METRICS = ("accuracy", "recall/F1", "hit-rate", "paired difference", "hallucination rate")
TRUTH = dict(zip(METRICS, (SKILL, F1_MEAN, 0.3, GAIN, HALLUCINATION_RATE), strict=True))
_BENCHMARKS_PER_TASK = 50


class CoverageTask(NamedTuple):
    clusters: int
    seed: np.random.SeedSequence
    count: int


def make_coverage_tasks(seed: int, count: int) -> list[CoverageTask]:
    made = []
    for clusters in (20, *CLUSTER_COUNTS):
        seeds = np.random.SeedSequence([seed, 1000 + clusters]).spawn(-(-count // _BENCHMARKS_PER_TASK))
        made += [
            CoverageTask(clusters, one, min(_BENCHMARKS_PER_TASK, count - at * _BENCHMARKS_PER_TASK))
            for at, one in enumerate(seeds)
        ]
    return made


def measure_coverage(task: CoverageTask) -> tuple[int, int, dict[str, int]]:
    """(clusters, simulated benchmarks, how many intervals of each metric held the truth)."""
    rng = np.random.default_rng(task.seed)
    covered = dict.fromkeys(METRICS, 0)
    for _ in range(task.count):
        for name, values_N, image_N in _simulate_metrics(task.clusters, rng):
            sums = ClusterSums(share=name != "paired difference")
            for value, image in zip(values_N.tolist(), image_N.tolist(), strict=True):
                sums.add(value, f"{image}")
            interval = sums.compute_interval(seed=int(rng.integers(1 << 31)), resamples=1000)
            assert interval.low is not None and interval.high is not None  # noqa: PT018
            covered[name] += interval.low <= TRUTH[name] <= interval.high
    return task.clusters, task.count, covered


def _simulate_metrics(clusters: int, rng: np.random.Generator) -> Iterator[tuple[str, Any, Any]]:
    """The values of every metric with their images: 1 to 10 questions an image, but 1 to 3 hallucination probes."""
    setting = Setting(images=clusters, correlation=0.1)
    image_N = np.repeat(np.arange(clusters), rng.integers(1, 11, clusters))
    champion, challenger = derive_paired_answers(draw_uniforms(image_N, setting, rng), SKILL, DISCORDANCE, GAIN)
    yield "accuracy", champion.astype(float), image_N
    near = 0.5 * (draw_uniforms(image_N, setting, rng) < 0.3)
    yield "recall/F1", np.where(champion, 1.0, near), image_N
    yield "hit-rate", (draw_uniforms(image_N, setting, rng) < 0.3).astype(float), image_N
    yield "paired difference", challenger.astype(float) - champion, image_N
    probes_N = np.repeat(np.arange(clusters), rng.integers(1, 4, clusters))
    yield "hallucination rate", (draw_uniforms(probes_N, setting, rng) < HALLUCINATION_RATE).astype(float), probes_N


def collect_coverage(measured: Sequence[tuple[int, int, dict[str, int]]]) -> list[dict[str, Any]]:
    rows = []
    for clusters in (20, *CLUSTER_COUNTS):
        parts = [(count, covered) for of, count, covered in measured if of == clusters]
        total = sum(count for count, _ in parts)
        for name in METRICS:
            share = sum(covered[name] for _, covered in parts) / total
            error = 1.96 * (share * (1 - share) / total) ** 0.5
            promised = clusters >= MIN_RELIABLE_CLUSTERS
            holds = LOW <= share <= HIGH if promised else None
            rows.append(
                {
                    "clusters": clusters,
                    "metric": name,
                    "coverage": share,
                    "error": error,
                    "benchmarks": total,
                    "holds": holds,
                }
            )
    return rows


def render_coverage_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## Coverage of the reported 95 % intervals",
        "",
        f"Simulated benchmarks of 1 to 10 questions a cluster, intra-cluster correlation 0.1. From {MIN_RELIABLE_CLUSTERS} "
        f"clusters on it must be {LOW:.0%} to {HIGH:.0%}; below that every report says that they are approximate.",
        "",
        "| clusters | " + " | ".join(METRICS) + " |",
        "|---" * (1 + len(METRICS)) + "|",
    ]
    for clusters in (20, *CLUSTER_COUNTS):
        cells = [
            f"{r['coverage']:.1%} ± {r['error']:.1%}" + (" **no**" if r["holds"] is False else "")
            for r in rows
            if r["clusters"] == clusters
        ]
        lines.append(f"| {clusters} | " + " | ".join(cells) + " |")
    return lines
