"""Coverage of the reported 95 % intervals, measured on simulated benchmarks with known truth.

The intervals are those of clincot.evaluation.intervals. gate_simulation.py runs this measurement; from
MIN_RELIABLE_CLUSTERS clusters on, coverage must be 93 % to 97 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.simulated_rounds import Setting, derive_paired_answers, draw_uniforms
from clincot.evaluation.intervals import MIN_RELIABLE_CLUSTERS, ClusterSums

CLUSTER_COUNTS = (20, 40, 80, 300)
LOW, HIGH = 0.93, 0.97  # bounds of an acceptable coverage
HALLUCINATION_RATE = 0.1
GAIN, DISCORDANCE, SKILL = 0.03, 0.15, 0.6
F1_MEAN = SKILL + (1 - SKILL) * 0.3 * 0.5  # 1 if right; if wrong, 0.5 in three of ten answers and else 0
METRICS = ("accuracy", "recall/F1", "hit-rate", "paired difference", "hallucination rate")
TRUTH = dict(zip(METRICS, (SKILL, F1_MEAN, 0.3, GAIN, HALLUCINATION_RATE), strict=True))
_BENCHMARKS_PER_TASK = 50


class CoverageTask(NamedTuple):
    """Simulated benchmarks for one worker call: how many, of how many clusters, from which seed."""

    clusters: int
    seed: np.random.SeedSequence
    count: int


def make_coverage_tasks(seed: int, count: int) -> list[CoverageTask]:
    """Divide `count` simulated benchmarks per number of clusters into tasks with seeds of their own."""
    tasks: list[CoverageTask] = []
    for clusters in CLUSTER_COUNTS:
        task_seeds = np.random.SeedSequence([seed, 1000 + clusters]).spawn(-(-count // _BENCHMARKS_PER_TASK))
        for index, task_seed in enumerate(task_seeds):
            size = min(_BENCHMARKS_PER_TASK, count - index * _BENCHMARKS_PER_TASK)
            tasks.append(CoverageTask(clusters, task_seed, size))
    return tasks


def measure_coverage(task: CoverageTask) -> tuple[int, int, dict[str, int]]:
    """Return (clusters, simulated benchmarks, number of intervals of each metric that contain the truth)."""
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
    """Yield (metric, values, images) for every metric.

    An image has 1 to 10 questions, but only 1 to 3 questions about absent findings.
    """
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
    """Combine the results of measure_coverage into one row per number of clusters and metric."""
    rows = []
    for clusters in CLUSTER_COUNTS:
        parts = [(count, covered) for task_clusters, count, covered in measured if task_clusters == clusters]
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
    """Render the rows as lines of Markdown."""
    lines = [
        "## Coverage of the reported 95 % intervals",
        "",
        "Simulated benchmarks have 1 to 10 questions per cluster and an intra-cluster correlation of 0.1. From "
        f"{MIN_RELIABLE_CLUSTERS} clusters on, coverage must be {LOW:.0%} to {HIGH:.0%}; with fewer clusters, every "
        "report calls its intervals approximate.",
        "",
        "| clusters | " + " | ".join(METRICS) + " |",
        "|---" * (1 + len(METRICS)) + "|",
    ]
    for clusters in CLUSTER_COUNTS:
        cells = [
            f"{row['coverage']:.1%} ± {row['error']:.1%}" + (" **no**" if row["holds"] is False else "")
            for row in rows
            if row["clusters"] == clusters
        ]
        lines.append(f"| {clusters} | " + " | ".join(cells) + " |")
    return lines
