"""Whether the challenger takes the champion's place: one paired comparison, every reason in a sentence.

The verdict is `promote` only if all of these hold in the given arm:
- the lower end of the 95 % interval of the paired accuracy difference is above `min_gain`;
- at most `max_off_format` of the challenger's answers are off format or could not be read (they are left out of
  the difference, so without this floor a challenger could gain by not answering);
- the lower end of its paired difference to the blind baseline is above 0.
Otherwise `keep`. It is `blocked` when the comparison itself cannot be trusted: an empty benchmark, question sets
that do not match, nothing scored, a NaN, or too few patients. One look, no correction for repeated looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from clincot.bench.intervals import APPROXIMATE_BELOW
from clincot.bench.paired import Side, difference, side_of
from clincot.records import Decision, Interval, Outcome

METRIC = "accuracy (strict)"
# With C clusters and no true difference, all C still favour the challenger with probability 2^-C; a one-sided 2.5 %
# needs 2^-C <= .025, so C >= 6.
FEWEST_CLUSTERS = 6


def decide(
    champion_outcomes: Iterable[Outcome],
    challenger_outcomes: Iterable[Outcome],
    clusters: Mapping[str, str],
    *,
    blind_outcomes: Iterable[Outcome],
    champion: str,
    challenger: str,
    benchmark: str,
    arm: str,
    min_gain: float = 0.0,
    max_off_format: float = 0.02,
    seed: int = 0,
    resamples: int = 2000,
) -> Decision:
    """Decide from what both and the blind baseline answered to the questions of `clusters` {question id: patient}.

    champion, challenger: the policies' digests; outcomes of other policies or arms are passed over, so a file of
    all outcomes may be given. blind_outcomes: BlindBaseline.outcomes. min_gain and max_off_format: shares of 1.
    Never raises on bad evidence: what is wrong becomes a reason of a `blocked` decision.
    """
    old = side_of("champion", _of(champion_outcomes, champion, arm), clusters)
    new = side_of("challenger", _of(challenger_outcomes, challenger, arm), clusters)
    blind = side_of("blind baseline", blind_outcomes, clusters)

    gain = Interval(value=None, n=0)
    problems = _problems(old, new, blind, clusters, min_gain=min_gain, max_off_format=max_off_format)
    if not problems:
        gain = difference(new, old, clusters, metric="correct", seed=seed, resamples=resamples)
        over_blind = difference(new, blind, clusters, metric="correct", seed=seed, resamples=resamples)
        problems = _too_little(gain, "champion") + _too_little(over_blind, "blind baseline")
    verdict: Literal["promote", "keep", "blocked"]
    if problems:
        verdict, reasons = "blocked", problems
    else:
        checks = [
            _gain_check(gain, min_gain),
            _format_check(new, max_off_format),
            _blind_check(over_blind),
        ]
        verdict = "promote" if all(passed for passed, _ in checks) else "keep"
        reasons = [reason for _, reason in checks] + _caution(gain)
    return Decision(
        champion=champion,
        challenger=challenger,
        benchmark=benchmark,
        metric=f"{METRIC}, arm {arm}",
        difference=gain,
        verdict=verdict,
        reasons=tuple(reasons),
    )


def _of(outcomes: Iterable[Outcome], policy: str, arm: str) -> Iterable[Outcome]:
    return (outcome for outcome in outcomes if outcome.policy == policy and outcome.arm == arm)


def _problems(
    old: Side, new: Side, blind: Side, clusters: Mapping[str, str], *, min_gain: float, max_off_format: float
) -> list[str]:
    """Why nothing can be compared; empty when it can."""
    if not clusters:
        return ["The benchmark is empty: there is no question to compare the two on."]
    problems = [
        f"{name} is {value}, which no result can be compared with."
        for name, value in (("min_gain", min_gain), ("max_off_format", max_off_format))
        if not math.isfinite(value)
    ]
    unclustered = [question for question, patient in clusters.items() if not patient]
    if unclustered:
        problems.append(f"{len(unclustered)} questions belong to no patient, first {unclustered[0]}.")
    problems += [*old.problems, *new.problems, *blind.problems]
    keyed = [
        question
        for question in clusters
        if len({side.outcomes[question].reference for side in (old, new, blind) if question in side.outcomes}) > 1
    ]
    if keyed:
        problems.append(f"The answer key differs between the sides for {len(keyed)} questions, first {keyed[0]}.")
    return problems


def _too_little(compared: Interval, other: str) -> list[str]:
    if compared.value is None:
        return [f"No question is scored for both the challenger and the {other}: all {compared.n_unscored} unscored."]
    if compared.clusters < FEWEST_CLUSTERS:
        return [
            f"Challenger and {other} are compared on {compared.clusters} patients; "
            f"with fewer than {FEWEST_CLUSTERS} even a unanimous result can be chance."
        ]
    return []


def _gain_check(gain: Interval, min_gain: float) -> tuple[bool, str]:
    passed = gain.low is not None and gain.low > min_gain
    return passed, (
        f"Challenger minus champion is {_shown(gain)} on {gain.n} questions of {gain.clusters} patients "
        f"({gain.n_unscored} unscored): its lower end is {'' if passed else 'not '}above {min_gain:g}."
    )


def _format_check(new: Side, max_off_format: float) -> tuple[bool, str]:
    off = sum(outcome.off_format or outcome.correct is None for outcome in new.outcomes.values())
    passed = off / len(new.outcomes) <= max_off_format
    return passed, (
        f"{off} of the challenger's {len(new.outcomes)} answers are off format or unreadable "
        f"({off / len(new.outcomes):.1%}): {'within' if passed else 'above'} the {max_off_format:.1%} allowed."
    )


def _blind_check(over_blind: Interval) -> tuple[bool, str]:
    passed = over_blind.low is not None and over_blind.low > 0
    return passed, (
        f"Challenger minus blind baseline is {_shown(over_blind)}: "
        f"it {'beats' if passed else 'does not beat'} answering without the image."
    )


def _caution(gain: Interval) -> list[str]:
    if gain.clusters >= APPROXIMATE_BELOW:
        return []
    return [f"The interval is approximate: {gain.clusters} patients, fewer than {APPROXIMATE_BELOW}."]


def _shown(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
