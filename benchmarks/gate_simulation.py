"""Error rate and power of the promotion gate, measured on thousands of simulated pipelines.

    python -m benchmarks.gate_simulation --seed 0            (make bench-gate SEED=0)

The pipelines are decided by the functions that the decide stage calls. Pipelines without a better challenger must
promote in at most `lifetime_error` of the cases, and those with a gain of 3 points in at least 80 %. The coverage of
the reported intervals is measured as well (gate_coverage.py). The exit code is 0 if everything holds.

Writes gate.json and gate.md to benchmarks/out. Each pipeline has a seed of its own, so the result does not depend on
the number of processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import beta, norm
from tqdm import tqdm

from benchmarks.gate_coverage import (
    collect_coverage,
    make_coverage_tasks,
    measure_coverage,
    render_coverage_table,
)
from benchmarks.simulated_rounds import Setting, SimulatedRound, draw_benchmark, draw_fresh_round, draw_repeated_round
from clincot.config import DecideConfig
from clincot.jsonl import atomic_write
from clincot.promotion.cluster_tests import ClusterRow, cluster_t_test
from clincot.promotion.error_budget import next_level
from clincot.promotion.gate import build_criteria
from clincot.promotion.verdict import check_gain, check_guards, should_promote
from clincot.records import Budget, Totals

ROUNDS = 50
CONFIG = DecideConfig()
PIPELINES_PER_TASK = 10
GATES = ("gate", "fixed 0.05", "naive")  # the gate and two simpler rules to compare it with


@dataclass(frozen=True)
class Scenario:
    """A kind of pipeline, and bounds on the share of pipelines that ever promote."""

    name: str
    about: str
    setting: Setting
    # The challenger of a round: a new one, the same again, or the same again while its p-value stays below 0.3.
    tested: Literal["new", "same", "adaptive"] = "new"
    reused: bool = False  # the same benchmark in all rounds
    rounds: int = ROUNDS
    at_most: float | None = CONFIG.lifetime_error
    at_least: float | None = None


SCENARIOS = (
    Scenario("equal, new questions", "a new challenger each round, as good as the champion", Setting()),
    Scenario("equal, one benchmark", "a new challenger each round, always the same questions", Setting(), reused=True),
    Scenario("equal, tested again", "one challenger, new questions each round, pooled", Setting(), tested="same"),
    Scenario("equal, chosen", "tested again while p < 0.3, otherwise replaced", Setting(), tested="adaptive"),
    Scenario("equal, 40 images", "a small benchmark, new questions each round", Setting(images=40)),
    Scenario("1 point worse", "a new challenger each round", Setting(gain=-0.01)),
    Scenario(
        "better, but at a floor", "+5 points of accuracy, 10 points of hit-rate lost", Setting(gain=0.05, hit_gain=-0.1)
    ),
    *(
        Scenario(
            f"+3 points, discordance {d:.0%}",
            "one challenger, 1,000 new questions of 300 images each round",
            Setting(images=300, questions=1000, discordance=d, gain=0.03),
            tested="same",
            rounds=5,
            at_most=None,
            at_least=0.8,
        )
        for d in (0.1, 0.15, 0.2)
    ),
    Scenario(
        "+3 points, new each round",
        "each round's challenger is new and 3 points better; first promotion",
        Setting(images=300, questions=1000, gain=0.03),
        rounds=5,
        at_most=None,
    ),
)


@dataclass
class SpentTest:
    """An earlier test, with the fields that clincot.promotion.error_budget.PastTest requires."""

    pair: tuple[str, str]
    budget: Budget
    promoted: bool


@dataclass
class PooledLooks:
    """The pooled rounds of one challenger so far."""

    gain: Totals = field(default_factory=Totals)
    rows: tuple[ClusterRow, ...] = ()
    rounds: list[SimulatedRound] = field(default_factory=list)

    def add_round(self, new_round: SimulatedRound) -> Totals:
        """Pool a round; returns the totals of its own gain."""
        gain, rows = new_round.sum_gains()
        self.gain, self.rows = self.gain + gain, merge_rows(self.rows, rows)
        self.rounds.append(new_round)
        return gain

    def sum_other_checks(self) -> tuple[dict[str, Totals], Totals]:
        """Return the pooled guards and the pooled difference from the blind baseline."""
        guards: dict[str, Totals] = {}
        blind = Totals()
        for pooled_round in self.rounds:
            round_guards, round_blind = pooled_round.draw_other_checks()
            for name, totals in round_guards.items():
                guards[name] = guards.get(name, Totals()) + totals
            blind = blind + round_blind
        return guards, blind


def merge_rows(rows: Sequence[ClusterRow], more: Sequence[ClusterRow]) -> tuple[ClusterRow, ...]:
    """Merge two tables of clusters; clusters with the same sum and size share a row, which keeps the table short."""
    counts = Counter({(s, m): count for s, m, count in rows})
    counts.update({(s, m): count for s, m, count in more})
    return tuple((s, m, count) for (s, m), count in counts.items())


def simulate_pipeline(scenario: Scenario, seed: np.random.SeedSequence) -> dict[str, int]:
    """Return the round (from 1) in which each gate first promotes; 0 if it never does."""
    rng = np.random.default_rng(seed)
    benchmark = draw_benchmark(scenario.setting, rng) if scenario.reused else None
    first = dict.fromkeys(GATES, 0)
    spent: list[SpentTest] = []
    looks, challenger = PooledLooks(), 1
    for round_number in range(1, scenario.rounds + 1):
        if benchmark is None:
            new_round = draw_fresh_round(scenario.setting, rng)
        else:
            new_round = draw_repeated_round(benchmark, scenario.setting, rng)
        gain = looks.add_round(new_round)
        entry, p = _decide_round(spent, ("champion", f"challenger-{challenger}"), looks)
        spent.append(entry)
        promoted = {"gate": entry.promoted, "fixed 0.05": _passes_fixed_test(gain), "naive": gain.total > 0}
        for name, promotes in promoted.items():
            first[name] = first[name] or round_number * promotes
        if all(first.values()) or (first["gate"] and scenario.at_least is not None):
            break
        if not (scenario.tested == "same" or (scenario.tested == "adaptive" and p < 0.3)):
            looks, challenger = PooledLooks(), challenger + 1
    return first


def _decide_round(spent: Sequence[SpentTest], pair: tuple[str, str], looks: PooledLooks) -> tuple[SpentTest, float]:
    """Decide as the decide stage does (clincot.promotion.gate); returns the budget's entry and the p-value."""
    budget = next_level(spent, pair, lifetime=CONFIG.lifetime_error)
    criteria = build_criteria(CONFIG)
    gain = check_gain(looks.gain, looks.rows, criteria, level=budget.level)
    promoted = gain.passed and should_promote(
        [gain, *check_guards(*looks.sum_other_checks(), criteria, level=budget.level)]
    )
    return SpentTest(pair, budget, promoted), 1.0 if gain.p is None else gain.p


def _passes_fixed_test(gain: Totals) -> bool:
    """Apply a simpler rule: a paired, clustered test of accuracy only, at level 0.05 in every round."""
    test = cluster_t_test(gain, 0.0)
    return test is not None and test.p <= 0.05


def simulate_chunk(task: tuple[int, list[np.random.SeedSequence]]) -> list[dict[str, int]]:
    """Simulate the pipelines of one task, (index of the scenario, seeds), in a worker process."""
    return [simulate_pipeline(SCENARIOS[task[0]], seed) for seed in task[1]]


def summarize_scenario(scenario: Scenario, firsts: Sequence[dict[str, int]]) -> dict[str, Any]:
    """Summarize the shares that ever promote, with 95 % Clopper-Pearson intervals, and whether the bounds hold."""
    n = len(firsts)
    shares = {}
    for name in GATES:
        count = sum(first[name] > 0 for first in firsts)
        shares[name] = {
            "share": count / n,
            "low": _clopper_pearson_limit(count, n, 0.025),
            "high": _clopper_pearson_limit(count, n, 0.975),
        }
    gate = shares["gate"]
    holds = None
    if scenario.at_most is not None:  # the limit may be exceeded within the Monte Carlo error
        holds = gate["low"] <= scenario.at_most
    if scenario.at_least is not None:
        holds = gate["share"] >= scenario.at_least
    promoted_in = Counter(first["gate"] for first in firsts if first["gate"])
    by_round = [count / n for count in accumulate(promoted_in[number] for number in range(1, scenario.rounds + 1))]
    return {
        "scenario": scenario.name,
        "about": scenario.about,
        "pipelines": n,
        "rounds": scenario.rounds,
        "setting": asdict(scenario.setting),
        "promote": shares,
        "by_round": by_round[:5],
        "at_most": scenario.at_most,
        "at_least": scenario.at_least,
        "holds": holds,
        "best": _bound_power(scenario) if scenario.at_least is not None else None,
    }


def _clopper_pearson_limit(count: int, n: int, tail: float) -> float:
    """Return the exact binomial limit with probability `tail` below it (lower limit if tail < 0.5)."""
    if tail < 0.5:
        return 0.0 if count == 0 else float(beta.ppf(tail, count, n - count + 1))
    return 1.0 if count == n else float(beta.ppf(tail, count + 1, n - count))


def _bound_power(scenario: Scenario) -> float:
    """Return an upper bound of the power, Phi(gain * sqrt(N) / sigma - z_alpha).

    It is the power of one normal test at level alpha on the questions of all rounds, with known variance and accuracy
    as the only check. sigma^2 includes the design effect 1 + (E[m^2] / E[m] - 1) * rho of clusters of m questions.
    """
    setting = scenario.setting
    n = setting.questions * scenario.rounds
    mean = setting.questions / setting.images  # of m, the questions of an image: 1 plus a binomial number
    spread = (setting.questions - setting.images) / setting.images * (1 - 1 / setting.images)
    design_effect = 1 + ((mean**2 + spread) / mean - 1) * setting.correlation
    variance = (setting.discordance - setting.gain**2) * design_effect
    return float(norm.cdf(setting.gain * math.sqrt(n / variance) - norm.isf(CONFIG.lifetime_error)))


def run_simulation(seed: int, pipelines: int, jobs: int, coverage: int) -> dict[str, Any]:
    """Simulate all scenarios and the coverage of intervals in `jobs` processes; returns the report as JSON.

    `pipelines`: per scenario. `coverage`: simulated benchmarks per number of clusters.
    """
    started = time.monotonic()
    tasks: list[tuple[int, list[np.random.SeedSequence]]] = []
    for index in range(len(SCENARIOS)):
        seeds = np.random.SeedSequence([seed, index]).spawn(pipelines)
        starts = range(0, pipelines, PIPELINES_PER_TASK)
        tasks.extend((index, seeds[start : start + PIPELINES_PER_TASK]) for start in starts)
    firsts: list[list[dict[str, int]]] = [[] for _ in SCENARIOS]
    with ProcessPoolExecutor(jobs) as pool:
        done = tqdm(pool.map(simulate_chunk, tasks), total=len(tasks), desc="pipelines", unit=" tasks", disable=None)
        for (index, _), part in zip(tasks, done, strict=True):
            firsts[index] += part
        coverage_tasks = make_coverage_tasks(seed, coverage)
        covered = list(
            tqdm(pool.map(measure_coverage, coverage_tasks), total=len(coverage_tasks), desc="coverage", disable=None)
        )
    scenarios = [summarize_scenario(scenario, first) for scenario, first in zip(SCENARIOS, firsts, strict=True)]
    coverages = collect_coverage(covered)
    worse = scenarios[5]["promote"]["gate"]["share"]
    fewer = worse <= scenarios[0]["promote"]["gate"]["share"]
    held = [row["holds"] is not False for row in (*scenarios, *coverages)]
    return {
        "seed": seed,
        "pipelines": pipelines,
        "settings": CONFIG.model_dump(mode="json"),
        "scenarios": scenarios,
        "coverage": coverages,
        "worse_promotes_fewer": fewer,
        "holds": fewer and all(held),
        "seconds": round(time.monotonic() - started),
    }


def render_report(report: dict[str, Any]) -> str:
    """Render the report as Markdown."""
    lines = [
        f"# The gate, simulated (seed {report['seed']}, {report['pipelines']} pipelines per row)",
        "",
        f"Lifetime budget {report['settings']['lifetime_error']:g}. Share of pipelines that ever promote, with the "
        "95 % interval of the Monte Carlo error. *fixed 0.05*: a paired clustered test of accuracy at 0.05 each round. "
        "*naive*: accuracy above the champion's.",
        "",
        "| pipelines | rounds | gate | fixed 0.05 | naive | must be | holds |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in report["scenarios"]:
        limit = f"<= {s['at_most']:.0%}" if s["at_most"] is not None else ""
        limit = f">= {s['at_least']:.0%} (theory: at most {s['best']:.1%})" if s["at_least"] is not None else limit
        cells = [_format_share(s["promote"][name]) for name in GATES]
        if s["at_least"] is not None:
            cells[1:] = ["–", "–"]  # these pipelines end when the gate promotes
        holds = {True: "yes", False: "**no**", None: ""}[s["holds"]]
        lines.append(f"| **{s['scenario']}**: {s['about']} | {s['rounds']} | {' | '.join(cells)} | {limit} | {holds} |")
    lines += ["", "Promoted by round 1, 2, 3, 4, 5:", ""]
    for s in report["scenarios"]:
        if s["rounds"] == 5:
            lines.append(f"- {s['scenario']}: {', '.join(f'{share:.1%}' for share in s['by_round'])}")
    verdict = "Fewer" if report["worse_promotes_fewer"] else "**More**"
    lines += [
        "",
        f"{verdict} worse challengers are promoted than equal ones.",
        "",
        *render_coverage_table(report["coverage"]),
    ]
    return "\n".join([*lines, "", "Everything holds." if report["holds"] else "**Not everything holds.**", ""])


def _format_share(share: dict[str, float]) -> str:
    return f"{share['share']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="Seed of all draws.")
    parser.add_argument("--pipelines", type=int, default=1000, help="Number of pipelines per scenario.")
    parser.add_argument(
        "--coverage", type=int, default=2000, help="Number of simulated benchmarks per number of clusters."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="Number of processes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="Folder of the report.")
    args = parser.parse_args(argv)
    report = run_simulation(args.seed, args.pipelines, args.jobs, args.coverage)
    writers: dict[str, Callable[[], str]] = {
        "gate.json": lambda: json.dumps(report, indent=2, allow_nan=False) + "\n",
        "gate.md": lambda: render_report(report),
    }
    for name, text in writers.items():
        with atomic_write(args.out / name) as file:
            file.write(text())
    print(render_report(report))
    return 0 if report["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
