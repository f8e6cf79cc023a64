"""One simulated round: what a champion and a challenger answer to clustered questions, as the gate's evidence.

Every question of an image copies, with probability √ρ, one draw that the image's questions share, and is drawn by
itself otherwise: any two questions of an image then have intra-cluster correlation exactly ρ, in every metric, and
in the *differences* between the two models, which is the harder case for a paired test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clincot.bench.cluster_tests import table_of, totals_of
from clincot.bench.verdict import Evidence

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

    def equal(self) -> Setting:
        return replace(self, gain=0.0, hit_gain=0.0)


def image_of(setting: Setting, rng: np.random.Generator) -> NDArray[np.intp]:
    """The image of every question."""
    if not setting.questions:
        return np.repeat(np.arange(setting.images), rng.integers(1, 11, setting.images))
    more = rng.integers(setting.images, size=setting.questions - setting.images)
    return np.sort(np.concatenate([np.arange(setting.images), more]))


def uniforms(image_N: NDArray[np.intp], setting: Setting, rng: np.random.Generator) -> Floats:
    """A uniform number a question, correlated inside an image."""
    copies = rng.random(len(image_N)) < np.sqrt(setting.correlation)
    shared = rng.random(setting.images)
    return np.where(copies, shared[image_N], rng.random(len(image_N)))


def paired(u_N: Floats, skill: float, discordance: float, gain: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(champion right, challenger right): both, only one (discordance in all), or neither."""
    only_champion, only_challenger = (discordance - gain) / 2, (discordance + gain) / 2
    both = skill - only_champion
    champion = u_N < skill
    challenger = (u_N < both) | ((u_N >= skill) & (u_N < skill + only_challenger))
    return champion, challenger


def given_champion(
    champion_N: NDArray[np.bool_], u_N: Floats, skill: float, discordance: float, gain: float
) -> NDArray[np.bool_]:
    """A challenger of a champion whose answers are already there (a benchmark that is used again)."""
    loses = u_N < (discordance - gain) / 2 / skill
    wins = u_N < (discordance + gain) / 2 / (1 - skill)
    return np.where(champion_N, ~loses, wins)


@dataclass(frozen=True)
class Benchmark:
    """Questions that may be asked again: their images, kinds, and what the champion answers to them."""

    image_N: NDArray[np.intp]
    closed_N: NDArray[np.bool_]
    probe_N: NDArray[np.bool_]
    boxed_N: NDArray[np.bool_]
    champion_N: NDArray[np.bool_]
    hits_N: NDArray[np.bool_]
    blind_N: NDArray[np.bool_]


def draw_benchmark(setting: Setting, rng: np.random.Generator) -> Benchmark:
    image_N = image_of(setting, rng)
    closed_N = rng.random(len(image_N)) < CLOSED
    return Benchmark(
        image_N,
        closed_N,
        closed_N & (rng.random(len(image_N)) < PROBES),
        rng.random(len(image_N)) < BOXED,
        uniforms(image_N, setting, rng) < SKILL,
        uniforms(image_N, setting, rng) < HIT,
        rng.random(len(image_N)) < BLIND,
    )


def fresh_round(setting: Setting, rng: np.random.Generator) -> tuple[Evidence, Floats]:
    """A round on new questions: its evidence, and the accuracy differences themselves."""
    b = draw_benchmark(setting, rng)
    champion, challenger = paired(uniforms(b.image_N, setting, rng), SKILL, setting.discordance, setting.gain)
    old_hit, new_hit = paired(uniforms(b.image_N, setting, rng), HIT, HIT_DISCORDANCE, setting.hit_gain)
    return _evidence(b, champion, challenger, old_hit, new_hit, rng)


def repeated_round(b: Benchmark, setting: Setting, rng: np.random.Generator) -> tuple[Evidence, Floats]:
    """A round of a new challenger on questions that have been asked before."""
    u_N, v_N = (uniforms(b.image_N, setting, rng) for _ in range(2))
    challenger = given_champion(b.champion_N, u_N, SKILL, setting.discordance, setting.gain)
    new_hit = given_champion(b.hits_N, v_N, HIT, HIT_DISCORDANCE, setting.hit_gain)
    return _evidence(b, b.champion_N, challenger, b.hits_N, new_hit, rng)


def _evidence(
    b: Benchmark, champion: NDArray[np.bool_], challenger: NDArray[np.bool_], old_hit: NDArray[np.bool_],
    new_hit: NDArray[np.bool_], rng: np.random.Generator,
) -> tuple[Evidence, Floats]:  # fmt: skip
    gain_N = challenger.astype(np.float64) - champion
    near_N = 0.5 * (rng.random(len(gain_N)) < 0.3)  # a wrong open answer may share words with the key
    f1_N = np.where(challenger, 1.0, near_N) - np.where(champion, 1.0, near_N)
    silent_2N = (rng.random((2, len(gain_N))) < ABSTAINS).astype(np.float64)
    words_2N = 1.0 + ~b.closed_N * rng.poisson(0.5, (2, len(gain_N)))

    def sums(values_N: Floats, on_N: NDArray[np.bool_] | None = None):  # type: ignore[no-untyped-def]
        return totals_of(values_N, b.image_N) if on_N is None else totals_of(values_N[on_N], b.image_N[on_N])

    evidence = Evidence(
        gain=sums(gain_N),
        gain_rows=table_of(gain_N, b.image_N),
        guards={
            "closed_accuracy": sums(gain_N, b.closed_N),
            "open_f1": sums(f1_N, ~b.closed_N),
            "hit_rate": sums(new_hit.astype(np.float64) - old_hit, b.boxed_N),
            "hallucination": sums(gain_N, b.probe_N),  # a wrong answer to a probe is a hallucination
            "abstention": sums(silent_2N[0] - silent_2N[1]),
            "answer_length": sums(words_2N[0] - words_2N[1]),
        },
        blind=sums(challenger.astype(np.float64) - b.blind_N),
    )
    return evidence, gain_N
