"""Does γ teach a policy to look where the next step needs it? A simulation with a stated model.

    python -m benchmarks.two_looks --seed 0

No checkpoint is run: the shipped models know one-look questions only. What is real are `plan_next_step`, which keeps
the best candidate as context, and `make_pairs`, which credits a step with the next one's scores. The model of the rest:

- A question has REGIONS regions, of which one is the key: only who described it first knows where the answer is.
- A judge finds the description of the key *less* convincing than those of the others (0.45 against 0.55, sd 0.1).
- An answer is right with probability 0.9 after the key, 0.5 otherwise, as it is with one look only. A judge gives right
  answers 0.75 and wrong ones 0.35 on average (sd 0.15).
- The policy is one logit: how much it prefers the key to each other region. Every pair of the first step that sets
  the key against another region moves it by the gradient of log σ.

The figure is the probability of a right answer when the policy chooses where to look first.

A second world needs two looks at *different* places: "are they alike?" is about two of the four regions, every
description is equally convincing (0.5, sd 0.1), and an answer is right with probability 0.95 if the two looks saw the
pair, 0.5 otherwise. Whether a first look is worth anything then shows only if it is continued from other regions, so
this world is run with both values of `answer.continue_from`. The figure is how often a pair of the first step that sets
one of the two regions against another one prefers it: 0.5 teaches nothing.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from typing import Literal

from clincot.config import PairConfig
from clincot.generation.candidates import GenerationRequest, plan_next_step
from clincot.geometry import Box
from clincot.preferences.pairs import NoPairs, make_pairs
from clincot.records import Candidate, PanelScore, PreferencePair, Question, Region, Study
from clincot.text import markdown_table

REGIONS = 4
RIGHT_AFTER_KEY, RIGHT_OTHERWISE = 0.9, 0.5
KEY_SCORE, OTHER_SCORE, DESCRIPTION_SD = 0.45, 0.55, 0.1
RIGHT_SCORE, WRONG_SCORE, ANSWER_SD = 0.75, 0.35, 0.15
_RATE = 0.05
PAIR = frozenset({0, 3})  # the regions of the second world that the question is about
ALIKE_RIGHT = 0.95  # once both have been seen


@dataclass(frozen=True)
class LookResult:
    """What a policy has learnt. `key_share`: how often it looks at the key first; `right`: P(right answer)."""

    key_share: float
    right: float
    pairs: int  # of the first step


def simulate_rounds(gamma: float, *, questions: int = 200, seed: int = 0) -> LookResult:
    """Train the one-logit policy on the pairs of two-step chains, credited with γ."""
    rng, preference, pairs_seen = random.Random(seed), 0.0, 0
    config = PairConfig(gamma=gamma, min_gap=0.05, per_question=4, same_region_share=1.0, length_auc_tolerance=0.5)
    for number in range(questions):
        candidates, scores = _run_chain(number, rng)
        key = candidates[0].id
        try:
            pairs, _ = make_pairs(candidates, scores, config)
        except NoPairs:
            continue
        for pair in pairs:
            preference += _RATE * _compute_push(pair, key, preference)
            pairs_seen += pair.step == 0
    share = 1 / (1 + (REGIONS - 1) * math.exp(-preference))
    return LookResult(share, share * RIGHT_AFTER_KEY + (1 - share) * RIGHT_OTHERWISE, pairs_seen)


@dataclass(frozen=True)
class CreditResult:
    """Pairs of the first step that set a region of the pair against another one, and the share that prefers it."""

    pairs: int
    preferred: float


def simulate_credit(
    gamma: float, continue_from: Literal["own", "all"], *, questions: int = 200, seed: int = 0
) -> CreditResult:
    """Make the pairs of the world with two places; no policy is trained."""
    rng, preferred, count = random.Random(seed), 0, 0
    config = PairConfig(gamma=gamma, min_gap=0.05, per_question=4, same_region_share=1.0, length_auc_tolerance=0.5)
    for number in range(questions):
        candidates, scores = _run_pair_chain(number, rng, continue_from)
        places = {candidate.id: place for place, candidate in enumerate(candidates[:REGIONS])}
        try:
            pairs, _ = make_pairs(candidates, scores, config)
        except NoPairs:
            continue
        for pair in pairs:
            if pair.step == 0 and (places[pair.chosen] in PAIR) != (places[pair.rejected] in PAIR):
                count += 1
                preferred += places[pair.chosen] in PAIR
    return CreditResult(count, preferred / max(1, count))


def _run_pair_chain(
    number: int, rng: random.Random, continue_from: Literal["own", "all"]
) -> tuple[list[Candidate], list[PanelScore]]:
    """Both steps of one question of the world with two places; the first candidates are in the regions' order."""
    answered = [
        (request, _build_candidate(request, f"description {place}"), _draw_score(0.5, DESCRIPTION_SD, rng))
        for place, request in enumerate(_list_first_requests(number))
    ]
    places = {request.region.id: place for place, (request, _, _) in enumerate(answered)}
    for request in list(plan_next_step(answered, continue_from=continue_from)):
        saw = {places[request.before[-1][0].id], places[request.region.id]}
        right = rng.random() < (ALIKE_RIGHT if saw == PAIR else RIGHT_OTHERWISE)
        score = _draw_score(RIGHT_SCORE if right else WRONG_SCORE, ANSWER_SD, rng)
        answered.append((request, _build_candidate(request, "yes" if right else "no"), score))
    scores = [PanelScore(candidate=one.id, score=score, spread=0.0, judges=2) for _, one, score in answered]
    return [candidate for _, candidate, _ in answered], scores


def _compute_push(pair: PreferencePair, key: str, preference: float) -> float:
    """The gradient of log σ(logit chosen - logit rejected); 0 for a pair that the key is not part of."""
    sign = (pair.chosen == key) - (pair.rejected == key)
    return sign / (1 + math.exp(sign * preference))


def _run_chain(number: int, rng: random.Random) -> tuple[list[Candidate], list[PanelScore]]:
    """Both steps of one question; the first candidate describes the key."""
    answered: list[tuple[GenerationRequest, Candidate, float | None]] = []
    for region_number, request in enumerate(_list_first_requests(number)):
        mean = OTHER_SCORE if region_number else KEY_SCORE
        candidate = _build_candidate(request, f"description {region_number}")
        answered.append((request, candidate, _draw_score(mean, DESCRIPTION_SD, rng)))
    key = answered[0][1].id
    for request in list(plan_next_step(answered)):
        chance = RIGHT_AFTER_KEY if request.before[-1][1].id == key else RIGHT_OTHERWISE
        right = rng.random() < chance
        score = _draw_score(RIGHT_SCORE if right else WRONG_SCORE, ANSWER_SD, rng)
        answered.append((request, _build_candidate(request, "yes" if right else "no"), score))
    scores = [PanelScore(candidate=one.id, score=score, spread=0.0, judges=2) for _, one, score in answered]
    return [candidate for _, candidate, _ in answered], scores


def _list_first_requests(number: int) -> list[GenerationRequest]:
    """The first look at each region of one question."""
    study = Study(image=f"{number}.png", sha256=f"{number:064x}", width=256, height=256)
    question = Question(study=study.id, text="What is it?", kind="closed")
    requests = []
    for region_number in range(REGIONS):
        corner = region_number * 0.2
        region = Region(
            question=question.id,
            hypothesis="finding",
            box=Box(x0=corner, y0=0.0, x1=corner + 0.2, y1=0.2),
            confidence=0.5,
            grounder="windows",
        )
        requests.append(GenerationRequest(study, question, region))
    return requests


def _build_candidate(request: GenerationRequest, text: str) -> Candidate:
    return Candidate(
        question=request.question.id,
        region=request.region.id,
        text=text,
        token_logprobs=(-0.1,),
        step=len(request.before),
        parent=request.parent,
        policy="simulated",
        prompt="simulated",
        seed=0,
        temperature=1.0,
    )


def _draw_score(mean: float, sd: float, rng: random.Random) -> float:
    return min(1.0, max(0.0, rng.gauss(mean, sd)))


def main() -> None:
    """Print two tables: one look and two looks for several γ, and what γ credits if the looks are at two places."""
    parser = argparse.ArgumentParser(description="Simulate chains of two looks for several values of γ.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=200)
    arguments = parser.parse_args()
    rows = [("one look", "–", f"{RIGHT_OTHERWISE:.3f}", "–")]
    for gamma in (0.0, 0.5, 1.0, 2.0):
        result = simulate_rounds(gamma, questions=arguments.questions, seed=arguments.seed)
        rows.append((f"two looks, γ {gamma:g}", f"{result.key_share:.3f}", f"{result.right:.3f}", str(result.pairs)))
    print(markdown_table(("", "key looked at first", "P(right answer)", "pairs of the first step"), rows))
    credits = []
    for gamma in (0.0, 1.0, 2.0):
        cells = [f"γ {gamma:g}"]
        for continue_from in ("own", "all"):
            credit = simulate_credit(gamma, continue_from, questions=arguments.questions, seed=arguments.seed)
            cells.append(f"{credit.preferred:.3f} of {credit.pairs}")
        credits.append(cells)
    print("\nTwo places: pairs that prefer a first look at one of them\n")
    print(markdown_table(("", "continue_from: own", "continue_from: all"), credits))


if __name__ == "__main__":
    main()
