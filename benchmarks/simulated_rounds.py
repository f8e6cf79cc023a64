"""One simulated round: what a champion and a challenger answer to clustered questions, as the gate's sums.

Every question of an image copies, with probability √ρ, one draw that the image's questions share, and is drawn by
itself otherwise: any two questions of an image then have intra-cluster correlation exactly ρ, in every metric, and
in the *differences* between the two models, which is the harder case for a paired test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clincot.promotion.cluster_tests import ClusterRow, compute_totals, tabulate_clusters
from clincot.records import Totals

Floats = NDArray[np.float64]

SKILL = 0.6  # the champion's accuracy
BLIND = 0.45  # the blind baseline's
CLOSED, PROBES, BOXED = (
    0.5,
    0.4,
    0.6,
)  # share of questions; of the closed ones that ask for an absent finding; with boxes
HIT, HIT_DISCORDANCE = 0.5, 0.15
ABSTAINS = 0.005


@dataclass(frozen=True)
class Setting:
    """A population of questions and how the challenger differs on it."""

    images: int = 182
    questions: int = 0  # 0: 1 to 10 an image, evenly; otherwise exactly so many, at least one an image
    correlation: float = 0.1
    discordance: float = 0.15  # share of questions on which exactly one of the two is right
    gain: float = 0.0  # the challenger's true gain in accuracy
    hit_gain: float = 0.0


def draw_images(setting: Setting, rng: np.random.Generator) -> NDArray[np.intp]:
    """The image of every question."""
    if not setting.questions:
        return np.repeat(np.arange(setting.images), rng.integers(1, 11, setting.images))
    more = rng.integers(setting.images, size=setting.questions - setting.images)
    return np.sort(np.concatenate([np.arange(setting.images), more]))


def draw_uniforms(image_N: NDArray[np.intp], setting: Setting, rng: np.random.Generator) -> Floats:
    """A uniform number a question, correlated inside an image."""
    copies = rng.random(len(image_N)) < np.sqrt(setting.correlation)
    shared = rng.random(setting.images)
    return np.where(copies, shared[image_N], rng.random(len(image_N)))


def derive_paired_answers(
    u_N: Floats, skill: float, discordance: float, gain: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(champion right, challenger right): both, only one (discordance in all), or neither."""
    only_champion, only_challenger = (discordance - gain) / 2, (discordance + gain) / 2
    both = skill - only_champion
    champion = u_N < skill
    challenger = (u_N < both) | ((u_N >= skill) & (u_N < skill + only_challenger))
    return champion, challenger


def derive_challenger(
    champion_N: NDArray[np.bool_], u_N: Floats, skill: float, discordance: float, gain: float
) -> NDArray[np.bool_]:
    """A challenger of a champion whose answers are already there (a benchmark that is used again)."""
    loses = u_N < (discordance - gain) / 2 / skill
    wins = u_N < (discordance + gain) / 2 / (1 - skill)
    return np.where(champion_N, ~loses, wins)


@dataclass(frozen=True)
class SimulatedBenchmark:
    """Questions that are asked every round: their images, and the seed of everything else about them."""

    image_N: NDArray[np.intp]
    champion_N: NDArray[np.bool_]
    seed: int


@dataclass
class SimulatedRound:
    """The challenger's gain, and the other checks' sums, which are drawn when the gain is large enough to ask for them.

    `promotes` asks for all checks, so a round whose gain is not shown is decided without them.
    """

    gain_N: Floats
    image_N: NDArray[np.intp]
    challenger_N: NDArray[np.bool_]
    champion_N: NDArray[np.bool_]
    setting: Setting
    seed: int  # of what this round draws
    benchmark_seed: int  # of what belongs to the questions

    def sum_gains(self) -> tuple[Totals, tuple[ClusterRow, ...]]:
        return compute_totals(self.gain_N, self.image_N), tabulate_clusters(self.gain_N, self.image_N)

    def draw_other_checks(self) -> tuple[dict[str, Totals], Totals]:
        """(guards, the blind baseline): sums of differences, higher is better, as clincot.promotion.evidence makes them."""
        rng, of = np.random.default_rng(self.seed), np.random.default_rng(self.benchmark_seed)
        n = len(self.gain_N)
        closed, blind = of.random(n) < CLOSED, of.random(n) < BLIND
        probe, boxed = closed & (of.random(n) < PROBES), of.random(n) < BOXED
        old_hit = draw_uniforms(self.image_N, self.setting, of) < HIT
        new_hit = derive_challenger(
            old_hit, draw_uniforms(self.image_N, self.setting, rng), HIT, HIT_DISCORDANCE, self.setting.hit_gain
        )
        near = 0.5 * (of.random(n) < 0.3)  # a wrong open answer may share words with the key
        f1 = np.where(self.challenger_N, 1.0, near) - np.where(self.champion_N, 1.0, near)
        silent_2N = (rng.random((2, n)) < ABSTAINS).astype(np.float64)
        words_2N = 1.0 + ~closed * rng.poisson(0.5, (2, n))
        everywhere = np.ones(n, dtype=np.bool_)
        guards = {
            "closed_accuracy": (self.gain_N, closed),
            "open_f1": (f1, ~closed),
            "hit_rate": (new_hit.astype(np.float64) - old_hit, boxed),
            "hallucination": (self.gain_N, probe),  # a wrong answer to a probe is a hallucination
            "abstention": (silent_2N[0] - silent_2N[1], everywhere),
            "answer_length": (words_2N[0] - words_2N[1], everywhere),
        }
        sums = {name: compute_totals(values[on], self.image_N[on]) for name, (values, on) in guards.items()}
        return sums, compute_totals(self.challenger_N.astype(np.float64) - blind, self.image_N)


def draw_benchmark(setting: Setting, rng: np.random.Generator) -> SimulatedBenchmark:
    image_N = draw_images(setting, rng)
    return SimulatedBenchmark(image_N, draw_uniforms(image_N, setting, rng) < SKILL, int(rng.integers(1 << 62)))


def draw_fresh_round(setting: Setting, rng: np.random.Generator) -> SimulatedRound:
    """A round on new questions."""
    image_N = draw_images(setting, rng)
    champion, challenger = derive_paired_answers(
        draw_uniforms(image_N, setting, rng), SKILL, setting.discordance, setting.gain
    )
    return _build_round(image_N, champion, challenger, setting, rng, benchmark_seed=int(rng.integers(1 << 62)))


def draw_repeated_round(b: SimulatedBenchmark, setting: Setting, rng: np.random.Generator) -> SimulatedRound:
    """A round of a new challenger on questions that have been asked before."""
    u_N = draw_uniforms(b.image_N, setting, rng)
    challenger = derive_challenger(b.champion_N, u_N, SKILL, setting.discordance, setting.gain)
    return _build_round(b.image_N, b.champion_N, challenger, setting, rng, benchmark_seed=b.seed)


def _build_round(
    image_N: NDArray[np.intp],
    champion: NDArray[np.bool_],
    challenger: NDArray[np.bool_],
    setting: Setting,
    rng: np.random.Generator,
    *,
    benchmark_seed: int,
) -> SimulatedRound:
    gain_N = challenger.astype(np.float64) - champion
    return SimulatedRound(gain_N, image_N, challenger, champion, setting, int(rng.integers(1 << 62)), benchmark_seed)
