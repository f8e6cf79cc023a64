"""A simulated round: answers of a champion and a challenger to clustered questions, as the sums that the gate reads.

Each question copies, with probability sqrt(rho), a draw that all questions of its image share, and otherwise has a draw
of its own. Any two questions of an image then have an intra-cluster correlation of exactly rho. This holds in every
metric and also in the *differences* between the two models, which is the harder case for a paired test.

Array names end in their shape: N questions, 2 models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clincot.promotion.cluster_tests import ClusterRow, compute_totals, tabulate_clusters
from clincot.records import Totals

Floats = NDArray[np.float64]

SKILL = 0.6  # the champion's accuracy
BLIND = 0.45  # the blind baseline's accuracy
CLOSED = 0.5  # share of closed questions
PROBES = 0.4  # share of the closed questions that ask for an absent finding
BOXED = 0.6  # share of questions with boxes
HIT, HIT_DISCORDANCE = 0.5, 0.15  # the champion's hit-rate; share of questions on which exactly one model hits
ABSTAINS = 0.005  # share of questions that a model does not answer


@dataclass(frozen=True)
class Setting:
    """A population of questions, and how the challenger differs from the champion on it."""

    images: int = 182
    questions: int = 0  # exact number, at least one per image; 0: 1 to 10 per image, uniformly
    correlation: float = 0.1  # rho, between the questions of an image
    discordance: float = 0.15  # share of questions that exactly one of the two models answers correctly
    gain: float = 0.0  # the challenger's true gain in accuracy
    hit_gain: float = 0.0


def draw_images(setting: Setting, rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw the image index of each question, (N,), sorted."""
    if not setting.questions:
        return np.repeat(np.arange(setting.images), rng.integers(1, 11, setting.images))
    more = rng.integers(setting.images, size=setting.questions - setting.images)
    return np.sort(np.concatenate([np.arange(setting.images), more]))


def draw_uniforms(image_N: NDArray[np.intp], setting: Setting, rng: np.random.Generator) -> Floats:
    """Draw a uniform number per question, (N,), correlated within an image."""
    copies = rng.random(len(image_N)) < np.sqrt(setting.correlation)
    shared = rng.random(setting.images)
    return np.where(copies, shared[image_N], rng.random(len(image_N)))


def derive_paired_answers(
    u_N: Floats, skill: float, discordance: float, gain: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Derive (champion right, challenger right) from uniform numbers.

    The unit interval is divided into both right, only the champion, only the challenger, and neither. `skill`: the
    champion's accuracy; `gain`: the challenger's accuracy minus the champion's.
    """
    only_champion, only_challenger = (discordance - gain) / 2, (discordance + gain) / 2
    both = skill - only_champion
    champion = u_N < skill
    challenger = (u_N < both) | ((u_N >= skill) & (u_N < skill + only_challenger))
    return champion, challenger


def derive_challenger(
    champion_N: NDArray[np.bool_], u_N: Floats, skill: float, discordance: float, gain: float
) -> NDArray[np.bool_]:
    """Derive a challenger's answers when the champion's are fixed, as on a benchmark that is used again."""
    loses = u_N < (discordance - gain) / 2 / skill
    wins = u_N < (discordance + gain) / 2 / (1 - skill)
    return np.where(champion_N, ~loses, wins)


@dataclass(frozen=True)
class SimulatedBenchmark:
    """Questions that are asked in every round, with the champion's answers.

    `seed`: of all other properties of the questions.
    """

    image_N: NDArray[np.intp]
    champion_N: NDArray[np.bool_]
    seed: int


@dataclass
class SimulatedRound:
    """The challenger's gain on each question; the sums of the other checks are drawn only when they are needed.

    A round whose gain is not significant is decided without the other checks, so drawing them would be wasted.
    """

    gain_N: Floats
    image_N: NDArray[np.intp]
    challenger_N: NDArray[np.bool_]
    champion_N: NDArray[np.bool_]
    setting: Setting
    seed: int  # of the draws that belong to this round
    benchmark_seed: int  # of the draws that belong to the questions

    def sum_gains(self) -> tuple[Totals, tuple[ClusterRow, ...]]:
        """Return the totals of the gain and its table of clusters."""
        return compute_totals(self.gain_N, self.image_N), tabulate_clusters(self.gain_N, self.image_N)

    def draw_other_checks(self) -> tuple[dict[str, Totals], Totals]:
        """Return (guards, challenger minus blind baseline), as sums of differences where higher is better.

        clincot.promotion.evidence computes the same sums from real outcomes.
        """
        rng, question_rng = np.random.default_rng(self.seed), np.random.default_rng(self.benchmark_seed)
        n = len(self.gain_N)
        closed, blind = question_rng.random(n) < CLOSED, question_rng.random(n) < BLIND
        probe, boxed = closed & (question_rng.random(n) < PROBES), question_rng.random(n) < BOXED
        old_hit = draw_uniforms(self.image_N, self.setting, question_rng) < HIT
        new_hit = derive_challenger(
            old_hit, draw_uniforms(self.image_N, self.setting, rng), HIT, HIT_DISCORDANCE, self.setting.hit_gain
        )
        near = 0.5 * (question_rng.random(n) < 0.3)  # a wrong open answer may share words with the key
        f1 = np.where(self.challenger_N, 1.0, near) - np.where(self.champion_N, 1.0, near)
        silent_2N = (rng.random((2, n)) < ABSTAINS).astype(np.float64)
        words_2N = 1.0 + ~closed * rng.poisson(0.5, (2, n))
        everywhere = np.ones(n, dtype=np.bool_)
        guards = {
            "closed_accuracy": (self.gain_N, closed),
            "open_f1": (f1, ~closed),
            "hit_rate": (new_hit.astype(np.float64) - old_hit, boxed),
            "hallucination": (
                self.gain_N,
                probe,
            ),  # a wrong answer to a question about an absent finding is a hallucination
            "abstention": (silent_2N[0] - silent_2N[1], everywhere),
            "answer_length": (words_2N[0] - words_2N[1], everywhere),
        }
        sums = {name: compute_totals(values[mask], self.image_N[mask]) for name, (values, mask) in guards.items()}
        return sums, compute_totals(self.challenger_N.astype(np.float64) - blind, self.image_N)


def draw_benchmark(setting: Setting, rng: np.random.Generator) -> SimulatedBenchmark:
    """Draw questions and the champion's answers."""
    image_N = draw_images(setting, rng)
    return SimulatedBenchmark(image_N, draw_uniforms(image_N, setting, rng) < SKILL, int(rng.integers(1 << 62)))


def draw_fresh_round(setting: Setting, rng: np.random.Generator) -> SimulatedRound:
    """Draw a round on new questions."""
    image_N = draw_images(setting, rng)
    champion, challenger = derive_paired_answers(
        draw_uniforms(image_N, setting, rng), SKILL, setting.discordance, setting.gain
    )
    return _build_round(image_N, champion, challenger, setting, rng, benchmark_seed=int(rng.integers(1 << 62)))


def draw_repeated_round(benchmark: SimulatedBenchmark, setting: Setting, rng: np.random.Generator) -> SimulatedRound:
    """Draw a round of a new challenger on questions that have been asked before."""
    u_N = draw_uniforms(benchmark.image_N, setting, rng)
    challenger = derive_challenger(benchmark.champion_N, u_N, SKILL, setting.discordance, setting.gain)
    return _build_round(
        benchmark.image_N, benchmark.champion_N, challenger, setting, rng, benchmark_seed=benchmark.seed
    )


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
