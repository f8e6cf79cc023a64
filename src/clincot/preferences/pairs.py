"""Preference pairs: two candidates of one question, the better first.

A pair is two *actions in the same situation*. So both sides come from one question, one step, one context (the
same parent candidate and wording) and one mode: either the policy wrote both regions or a tool gave both, since
a loss counts region tokens only where the policy wrote them and must not count them on one side alone.

Question by question: only the pairs kept (at most k a question) are held in memory.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from random import Random
from typing import Annotated

from pydantic import Field

from clincot.config import PairConfig
from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, UnitFloat
from clincot.records import Candidate, PanelScore, PreferencePair, hash_json

Count = Annotated[int, Field(ge=0)]


class BadPairInput(InvalidInput):
    """Candidates and scores that do not belong together, or do not stand in question order."""


class PairReport(FrozenModel):
    """Everything considered, kept and dropped: considered = pairs + sum(dropped)."""

    questions: Count
    questions_with_pairs: Count
    candidates: Count
    candidates_unscored: Count  # no panel score, or none for any of their next steps
    chains_cut: Count  # groups scored without gamma because only some of their candidates were continued
    considered: Count  # combinations of two candidates of one question and step
    dropped: dict[str, int]  # reason -> combinations
    pairs: Count
    same_region: Count  # pairs whose sides look at the same place
    written: Count  # pairs whose regions the policy wrote
    longer_rejected_auc_before: UnitFloat | None  # P(rejected text longer) + P(equal)/2, in characters; None: no pairs
    longer_rejected_auc: UnitFloat | None  # the same of the pairs kept
    longer_rejected_auc_tokens: UnitFloat | None  # of the pairs kept, in tokens of the answer; reported, not balanced
    mean_chosen_chars: float | None
    mean_rejected_chars: float | None
    contradictions: Count = 0  # pairs whose two texts another pair of the question has the other way round
    gaps_considered: dict[str, int]  # lower edge of a bin 0.1 wide -> combinations of comparable candidates
    gaps_kept: dict[str, int]


class NoPairs(InvalidInput):
    """Not one pair is left; `report` says where they went."""

    def __init__(self, report: PairReport) -> None:
        self.report = report
        super().__init__(
            f"no preference pair left of {report.considered} combinations of {report.candidates} candidates "
            f"({report.candidates_unscored} unscored) to {report.questions} questions; dropped: {report.dropped}"
        )


@dataclass(frozen=True)
class _ScoredCandidate:
    """A candidate with what it is worth."""

    candidate: Candidate
    score: float | None  # s_cur + gamma * s_next
    spread: float
    judges: int

    @property
    def context(self) -> tuple[str, str]:
        return (self.candidate.parent, self.candidate.prompt)

    @property
    def action(self) -> tuple[str, str]:
        return (self.candidate.text.strip(), self.candidate.region)


@dataclass(frozen=True)
class _EligiblePair:
    """A pair with what the balance needs to know of it."""

    pair: PreferencePair
    same_region: bool
    written: bool
    chars: tuple[int, int]  # chosen, rejected
    tokens: tuple[int, int]
    texts: tuple[str, str]

    @property
    def longer(self) -> int:
        """1 where the rejected text is the longer one, -1 where the chosen is, 0 where they are equal."""
        return (self.chars[1] > self.chars[0]) - (self.chars[1] < self.chars[0])


_PairPools = dict[tuple[int, bool], list[int]]


def make_pairs(
    candidates: Iterable[Candidate], scores: Iterable[PanelScore], config: PairConfig
) -> tuple[list[PreferencePair], PairReport]:
    """Pairs, in question order, and the report.

    `candidates` in question order; `scores` one a candidate, in the same order (as judge_candidates writes
    them). Raises BadPairInput where they are not, NoPairs (with the report) when nothing is left.
    """
    tally = _PairTally()
    kept: list[_EligiblePair] = []
    same = 0
    for question, scored in _group_by_question(candidates, scores):
        eligible = _find_eligible_pairs(_score_chains(question, scored, config.gamma, tally), config.min_gap, tally)
        if config.pick == "top":
            eligible.sort(key=lambda one: -_round_gap(one.pair.gap))  # stable: equal gaps stay in file order
        else:
            Random(f"{config.seed} {question}").shuffle(eligible)
        picked = 0
        for one in eligible:
            if picked == config.per_question:
                tally.dropped["beyond per_question"] += 1
            elif one.same_region and same + 1 > config.same_region_share * (len(kept) + 1):
                tally.dropped["same_region_share reached"] += 1
            else:
                kept.append(one)
                same += one.same_region
                picked += 1
    before = _compute_length_auc([k.chars for k in kept])
    kept = _balance_pairs(kept, config, tally)
    report = tally.build_report(kept, auc_before=before)
    if not kept:
        raise NoPairs(report)
    return [k.pair for k in kept], report


def _group_by_question(
    candidates: Iterable[Candidate], scores: Iterable[PanelScore]
) -> Iterator[tuple[str, list[tuple[Candidate, PanelScore]]]]:
    """Candidates with their scores, question by question."""
    seen: set[str] = set()
    for question, group in groupby(_join_scores(candidates, scores), key=lambda both: both[0].question):
        if question in seen:
            raise BadPairInput(f"the candidates of {question} do not stand together; expected question order")
        seen.add(question)
        yield question, list(group)
    if not seen:
        raise BadPairInput("no candidates to pair: the candidates file is empty")


def _join_scores(
    candidates: Iterable[Candidate], scores: Iterable[PanelScore]
) -> Iterator[tuple[Candidate, PanelScore]]:
    waiting = iter(scores)
    for candidate in candidates:
        score = next(waiting, None)
        if score is None:
            raise BadPairInput(f"the scores end before {candidate.id}; expected one score a candidate")
        if score.candidate != candidate.id:
            raise BadPairInput(
                f"expected the score of {candidate.id}, got the one of {score.candidate}; "
                "scores must stand in the candidates' order"
            )
        yield candidate, score
    if (extra := next(waiting, None)) is not None:
        raise BadPairInput(f"the score of {extra.candidate} has no candidate")


def _score_chains(
    question: str, scored: Sequence[tuple[Candidate, PanelScore]], gamma: float, tally: _PairTally
) -> list[_ScoredCandidate]:
    """Chain scores: s = s_cur + gamma * mean(s_next over the candidates that continue this one) [UV-CoT].

    Siblings of which only some were continued are scored by s_cur alone: the term would otherwise reward being
    continued. A continued candidate none of whose continuations has a score is itself unscored.
    """
    known = {candidate.id for candidate, _ in scored}
    children: dict[str, list[float | None]] = defaultdict(list)
    for candidate, panel in scored:
        if candidate.parent:
            if candidate.parent not in known:
                raise BadPairInput(f"{candidate.id} continues {candidate.parent}, not a candidate of {question}")
            children[candidate.parent].append(panel.score)
    siblings: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for candidate, _ in scored:
        siblings[_make_sibling_key(candidate)].append(candidate.id)
    continued = {key: sum(one in children for one in ids) for key, ids in siblings.items()}
    tally.chains_cut += sum(0 < continued[key] < len(ids) for key, ids in siblings.items())
    sides = []
    for candidate, panel in scored:
        score = panel.score
        key = _make_sibling_key(candidate)
        if gamma > 0 and score is not None and continued[key] == len(siblings[key]):
            following = [s for s in children[candidate.id] if s is not None]
            score = score + gamma * sum(following) / len(following) if following else None
        sides.append(_ScoredCandidate(candidate, score, panel.spread, panel.judges))
        tally.unscored += score is None
    tally.questions += 1
    tally.candidates += len(scored)
    return sides


def _make_sibling_key(candidate: Candidate) -> tuple[object, ...]:
    """Candidates that may be compared share this."""
    return (candidate.step, candidate.parent, candidate.prompt, candidate.region_written)


def _find_eligible_pairs(sides: Sequence[_ScoredCandidate], min_gap: float, tally: _PairTally) -> list[_EligiblePair]:
    """Every pair that the candidates of one question allow, in file order; what is dropped is counted."""
    found = []
    taken: set[frozenset[tuple[str, str]]] = set()
    for one, other in combinations(sides, 2):
        if one.candidate.step != other.candidate.step:
            continue
        tally.considered += 1
        if reason := _explain_unfit(one, other):
            tally.dropped[reason] += 1
            continue
        if one.score is None or other.score is None:
            tally.dropped["unscored"] += 1
            continue
        gap = _round_gap(abs(one.score - other.score))
        tally.gaps[_bin_gap(gap)] += 1
        actions = frozenset((one.action, other.action))
        if gap < min_gap:
            tally.dropped["gap below min_gap"] += 1
        elif actions in taken:
            tally.dropped["duplicate of another pair"] += 1
        else:
            taken.add(actions)
            ordered = (one, other) if one.score > other.score else (other, one)
            found.append(_build_pair(*ordered, max(one.score, other.score), min(one.score, other.score)))
    return found


def _explain_unfit(one: _ScoredCandidate, other: _ScoredCandidate) -> str:
    """Why two candidates of one step do not make a pair whatever their scores; "" if they may."""
    if one.context != other.context:
        return "different context"
    if one.candidate.region_written != other.candidate.region_written:
        return "region written on one side only"
    if one.action == other.action:
        return "same text, same region"
    if one.action[0] == other.action[0] and not one.candidate.region_written:
        return "same text, regions given"  # the policy did nothing different
    if one.score is not None and other.score is not None and one.judges != other.judges:
        return "scored by different numbers of judges"  # the gap would partly be one between judges
    return ""


def _build_pair(
    chosen: _ScoredCandidate, rejected: _ScoredCandidate, chosen_score: float, rejected_score: float
) -> _EligiblePair:
    better, worse = chosen.candidate, rejected.candidate
    pair = PreferencePair(
        question=better.question,
        chosen=better.id,
        rejected=worse.id,
        chosen_region=better.region,
        rejected_region=worse.region,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
        spread=(chosen.spread + rejected.spread) / 2,
        step=better.step,
    )
    return _EligiblePair(
        pair,
        same_region=chosen.candidate.region == rejected.candidate.region,
        written=better.region_written,
        chars=(len(better.text), len(worse.text)),
        tokens=(len(better.token_logprobs), len(worse.token_logprobs)),
        texts=(better.text.strip(), worse.text.strip()),
    )


def _balance_pairs(kept: Sequence[_EligiblePair], config: PairConfig, tally: _PairTally) -> list[_EligiblePair]:
    """Drop surplus pairs, one at a time, until neither length nor same_region_share is out of bounds.

    Which of a surplus goes is decided by a hash of seed and pair: dropping the smallest gaps, say, would leave
    a gap that depends on which side is longer.
    """
    lot = sorted(range(len(kept)), key=lambda i: hash_json([config.seed, kept[i].pair.id]))
    # (rejected longer 1, shorter -1, equal 0; same region) -> places in `lot`, the first to go last
    pools: _PairPools = {(longer, same): [] for longer in (1, 0, -1) for same in (True, False)}
    for place, i in enumerate(lot):
        pools[kept[i].longer, kept[i].same_region].append(place)
    while (surplus := _find_surplus(pools, config)) is not None:
        pool, reason = surplus
        pool.pop()
        tally.dropped[reason] += 1
    left = {lot[place] for pool in pools.values() for place in pool}
    return [one for i, one in enumerate(kept) if i in left]


def _find_surplus(pools: _PairPools, config: PairConfig) -> tuple[list[int], str] | None:
    """The pool that the next pair to go is in, and why it goes; None when both limits hold.

    A pair dropped for one limit should not strain the other, or the two would take turns until nothing is left.
    """
    n = sum(len(pool) for pool in pools.values())
    n_same = sum(len(pool) for (_, same), pool in pools.items() if same)
    ahead = sum(longer * len(pool) for (longer, _), pool in pools.items())
    if n == 0:
        return None
    if abs(ahead) > 2 * n * config.length_auc_tolerance:  # AUC - 0.5 = ahead / 2n
        side = 1 if ahead > 0 else -1
        same, different = pools[side, True], pools[side, False]
        if same and n_same > config.same_region_share * (n - 1):
            return same, "length balance"
        return max(same, different, key=lambda pool: pool[-1] if pool else -1), "length balance"
    if n_same > config.same_region_share * n:
        order = (0, 1, -1) if ahead == 0 else (1, 0, -1) if ahead > 0 else (-1, 0, 1)
        return next(pools[side, True] for side in order if pools[side, True]), "same_region_share reached"
    return None


def _compute_length_auc(lengths: Sequence[tuple[int, int]]) -> float | None:
    """AUC of "the longer side is the rejected one" over (chosen, rejected) lengths; ties count half."""
    if not lengths:
        return None
    return sum(1.0 if r > c else 0.5 if r == c else 0.0 for c, r in lengths) / len(lengths)


def _round_gap(gap: float) -> float:
    """Gaps are compared at 9 decimals: 0.7 - 0.4 is 0.3, not 0.29999999999999993."""
    return round(gap, 9)


def _bin_gap(gap: float) -> str:
    return f"{math.floor(_round_gap(gap * 10)) / 10:.1f}"


class _PairTally:
    """Running counts of the report."""

    def __init__(self) -> None:
        self.questions = self.candidates = self.unscored = self.chains_cut = self.considered = 0
        self.dropped: Counter[str] = Counter()
        self.gaps: Counter[str] = Counter()

    def build_report(self, kept: Sequence[_EligiblePair], *, auc_before: float | None) -> PairReport:
        gaps_kept = Counter(_bin_gap(_round_gap(one.pair.gap)) for one in kept)
        return PairReport(
            questions=self.questions,
            questions_with_pairs=len({one.pair.question for one in kept}),
            candidates=self.candidates,
            candidates_unscored=self.unscored,
            chains_cut=self.chains_cut,
            considered=self.considered,
            dropped=dict(sorted(self.dropped.items())),
            pairs=len(kept),
            same_region=sum(one.same_region for one in kept),
            written=sum(one.written for one in kept),
            longer_rejected_auc_before=auc_before,
            longer_rejected_auc=_compute_length_auc([one.chars for one in kept]),
            longer_rejected_auc_tokens=_compute_length_auc([one.tokens for one in kept]),
            mean_chosen_chars=sum(one.chars[0] for one in kept) / len(kept) if kept else None,
            mean_rejected_chars=sum(one.chars[1] for one in kept) / len(kept) if kept else None,
            contradictions=_count_contradictions(kept),
            gaps_considered=_sort_bins(self.gaps),
            gaps_kept=_sort_bins(gaps_kept),
        )


def _count_contradictions(kept: Sequence[_EligiblePair]) -> int:
    """Two regions may give one text different scores, so a few are no error; many leave no answer to be learnt."""
    orders = {(one.pair.question, one.pair.step, *one.texts) for one in kept}
    return sum(
        (one.pair.question, one.pair.step, *reversed(one.texts)) in orders for one in kept if len(set(one.texts)) > 1
    )


def _sort_bins(bins: Counter[str]) -> dict[str, int]:
    return dict(sorted(bins.items(), key=lambda bin_: float(bin_[0])))
