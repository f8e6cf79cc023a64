"""Preference pairs: two candidates of one question, the better one first.

A pair is two *actions in the same situation*. Both sides therefore share the question, the step, the context (parent
candidate and prompt template) and the mode: either the policy wrote both regions or a tool proposed both. The loss
counts region tokens only where the policy wrote them, and must not count them on one side only.

Candidates are read question by question; only the selected pairs (at most k per question) stay in memory.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, groupby, product
from random import Random
from typing import Annotated

from pydantic import Field

from clincot.config import PairConfig
from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, UnitFloat
from clincot.judging.topic_agreement import GroupAgreement, PanelKnowledge
from clincot.records import Candidate, PanelScore, PreferencePair, hash_json
from clincot.text import normalize_text

Count = Annotated[int, Field(ge=0)]

# An answer in fewer pairs of a topic is no habit that they could teach; answers in sentences hardly ever come twice.
_FREQUENT_USES = 20


class BadPairInput(InvalidInput):
    """Candidates and scores that do not match, or are not in question order."""


class PairReport(FrozenModel):
    """How many combinations were considered, kept and dropped: considered = pairs + sum(dropped)."""

    questions: Count
    questions_with_pairs: Count
    candidates: Count
    candidates_unscored: Count  # no panel score, or none for any of their continuations
    chains_cut: Count  # sibling groups scored without gamma because only some of their candidates were continued
    considered: Count  # combinations of two candidates of one question and step
    dropped: dict[str, int]  # reason -> combinations
    pairs: Count
    same_region: Count  # pairs whose sides look at the same region, so that they differ in the answer alone
    same_text: Count = 0  # pairs whose sides say the same, so that they differ in the written region alone
    written: Count  # pairs whose regions the policy wrote
    longer_rejected_auc_before: UnitFloat | None  # P(rejected text longer) + P(equal)/2, in characters; None: no pairs
    longer_rejected_auc: UnitFloat | None  # the same after balancing
    length_auc_tolerance: UnitFloat = 0.05  # the balanced one may be 0.5 ± this (pair.length_auc_tolerance)
    longer_rejected_auc_tokens: UnitFloat | None  # after balancing, in answer tokens; reported, not balanced
    mean_chosen_chars: float | None
    mean_rejected_chars: float | None
    contradictions: Count = 0  # pairs of texts that another pair of the question has the other way round
    gaps_considered: dict[str, int]  # lower edge of a bin 0.1 wide -> combinations of comparable candidates
    gaps_kept: dict[str, int]
    # "TOPIC" or "TOPIC, GROUNDER" -> agreement of the judges; only with pair.min_agreement
    agreement: dict[str, GroupAgreement] = Field(default_factory=dict, exclude_if=lambda groups: not groups)
    left_out: tuple[str, ...] = Field(default=(), exclude_if=lambda groups: not groups)  # groups below min_agreement


class NoPairs(InvalidInput):
    """No pair is left; `report` says why."""

    def __init__(self, report: PairReport) -> None:
        self.report = report
        super().__init__(
            f"no preference pair left of {report.considered} combinations of {report.candidates} candidates "
            f"({report.candidates_unscored} unscored) to {report.questions} questions; dropped: {report.dropped}"
        )


@dataclass(frozen=True)
class _ScoredCandidate:
    """A candidate with its chain score."""

    candidate: Candidate
    score: float | None  # s_cur + gamma * s_next
    spread: float
    judges: int

    @property
    def context(self) -> tuple[str, str]:
        """What the policy had seen before it acted."""
        return (self.candidate.parent, self.candidate.prompt)

    @property
    def action(self) -> tuple[str, str]:
        """What the policy did: its text and the region."""
        return (self.candidate.text.strip(), self.candidate.region)


@dataclass(frozen=True)
class _EligiblePair:
    """A pair with the properties that balancing needs."""

    pair: PreferencePair
    same_region: bool
    written: bool
    chars: tuple[int, int]  # lengths of the chosen and the rejected text
    tokens: tuple[int, int]
    texts: tuple[str, str]

    @property
    def longer(self) -> int:
        """1 if the rejected text is longer, -1 if the chosen text is, 0 if they are equally long."""
        return (self.chars[1] > self.chars[0]) - (self.chars[1] < self.chars[0])


_PairPools = dict[tuple[int, bool], list[int]]  # (longer, same region) -> ranks of pairs


def make_pairs(
    candidates: Iterable[Candidate],
    scores: Iterable[PanelScore],
    config: PairConfig,
    *,
    knowledge: PanelKnowledge | None = None,
    topics: Mapping[str, str] | None = None,
) -> tuple[list[PreferencePair], PairReport]:
    """Make the pairs, in question order, and the report.

    candidates: in question order. scores: one for each candidate, in the same order, as judge_candidates writes them.
    knowledge: candidates of groups of which the panel knows too little make no pair; None: all are compared.
    topics: {question: its topic}, within which answers are balanced (config.max_answer_bias); None: over all questions.
    Raises BadPairInput if they do not match, and NoPairs (with the report) if no pair is left.
    """
    tally = _PairTally()
    selected: list[_EligiblePair] = []
    same_region = 0
    for question, scored in _group_by_question(candidates, scores):
        chains = _score_chains(question, scored, config.gamma, tally)
        eligible = _find_eligible_pairs(chains, config.min_gap, tally, knowledge)
        if config.pick == "top":
            eligible.sort(key=lambda pair: -_round_gap(pair.pair.gap))  # stable: equal gaps stay in file order
        else:
            Random(f"{config.seed} {question}").shuffle(eligible)
        picked = 0
        for pair in eligible:
            if picked == config.per_question:
                tally.dropped["beyond per_question"] += 1
            elif pair.same_region and same_region + 1 > config.same_region_share * (len(selected) + 1):
                tally.dropped["same_region_share reached"] += 1
            else:
                selected.append(pair)
                same_region += pair.same_region
                picked += 1
    auc_before = _compute_length_auc([pair.chars for pair in selected])
    balanced = _balance_pairs(_balance_answers(selected, config, topics or {}, tally), config, tally)
    report = tally.build_report(balanced, auc_before=auc_before, tolerance=config.length_auc_tolerance)
    if knowledge is not None:
        known = {"agreement": knowledge.agreement, "left_out": knowledge.left_out}
        report = report.model_copy(update=known)
    if not balanced:
        raise NoPairs(report)
    return [pair.pair for pair in balanced], report


def _group_by_question(
    candidates: Iterable[Candidate], scores: Iterable[PanelScore]
) -> Iterator[tuple[str, list[tuple[Candidate, PanelScore]]]]:
    """Candidates with their scores, question by question."""
    seen: set[str] = set()
    for question, group in groupby(_join_scores(candidates, scores), key=lambda joined: joined[0].question):
        if question in seen:
            raise BadPairInput(f"the candidates of {question} are not consecutive; expected question order")
        seen.add(question)
        yield question, list(group)
    if not seen:
        raise BadPairInput("no candidates to pair: the candidates file is empty")


def _join_scores(
    candidates: Iterable[Candidate], scores: Iterable[PanelScore]
) -> Iterator[tuple[Candidate, PanelScore]]:
    remaining = iter(scores)
    for candidate in candidates:
        score = next(remaining, None)
        if score is None:
            raise BadPairInput(f"the scores end before {candidate.id}; expected one score for each candidate")
        if score.candidate != candidate.id:
            raise BadPairInput(
                f"expected the score of {candidate.id}, got the one of {score.candidate}; "
                "scores must be in the order of the candidates"
            )
        yield candidate, score
    if (extra := next(remaining, None)) is not None:
        raise BadPairInput(f"the score of {extra.candidate} has no candidate")


def _score_chains(
    question: str, scored: Sequence[tuple[Candidate, PanelScore]], gamma: float, tally: _PairTally
) -> list[_ScoredCandidate]:
    """Chain scores: s = s_cur + gamma * mean(s_next over the candidates that continue this one) [UV-CoT].

    If only some siblings were continued, all of them are scored by s_cur without the second term, which would otherwise
    reward being continued. A continued candidate is unscored if none of its continuations has a score.
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
    continued: dict[tuple[object, ...], int] = {}
    for key, ids in siblings.items():
        continued[key] = sum(sibling in children for sibling in ids)
    tally.chains_cut += sum(0 < continued[key] < len(ids) for key, ids in siblings.items())
    scored_chains = []
    for candidate, panel in scored:
        score = panel.score
        key = _make_sibling_key(candidate)
        if gamma > 0 and score is not None and continued[key] == len(siblings[key]):
            following = [s_next for s_next in children[candidate.id] if s_next is not None]
            score = score + gamma * sum(following) / len(following) if following else None
        scored_chains.append(_ScoredCandidate(candidate, score, panel.spread, panel.judges))
        tally.unscored += score is None
    tally.questions += 1
    tally.candidates += len(scored)
    return scored_chains


def _make_sibling_key(candidate: Candidate) -> tuple[object, ...]:
    """A key shared by the candidates that may be compared with each other."""
    return (candidate.step, candidate.parent, candidate.prompt, candidate.region_written)


def _find_eligible_pairs(
    candidates: Sequence[_ScoredCandidate],
    min_gap: float,
    tally: _PairTally,
    knowledge: PanelKnowledge | None,
) -> list[_EligiblePair]:
    """Every pair that the candidates of one question allow, in file order; dropped combinations are counted."""
    eligible = []
    used_actions: set[frozenset[tuple[str, str]]] = set()
    trusted = {c.candidate.id: knowledge is None or knowledge.is_trusted(c.candidate) for c in candidates}
    for a, b in combinations(candidates, 2):
        if a.candidate.step != b.candidate.step:
            continue
        tally.considered += 1
        if reason := _explain_unfit(a, b):
            tally.dropped[reason] += 1
            continue
        if a.score is None or b.score is None:
            tally.dropped["unscored"] += 1
            continue
        if not (trusted[a.candidate.id] and trusted[b.candidate.id]):
            tally.dropped["judges know too little"] += 1
            continue
        gap = _round_gap(abs(a.score - b.score))
        tally.gaps[_bin_gap(gap)] += 1
        actions = frozenset((a.action, b.action))
        if gap < min_gap:
            tally.dropped["gap below min_gap"] += 1
        elif actions in used_actions:
            tally.dropped["duplicate of another pair"] += 1
        else:
            used_actions.add(actions)
            chosen, rejected = (a, b) if a.score > b.score else (b, a)
            eligible.append(_build_pair(chosen, rejected, max(a.score, b.score), min(a.score, b.score)))
    return eligible


def _explain_unfit(a: _ScoredCandidate, b: _ScoredCandidate) -> str:
    """Why two candidates of one step make no pair whatever their scores are; "" if they may make one."""
    if a.context != b.context:
        return "different context"
    if a.candidate.region_written != b.candidate.region_written:
        return "region written on one side only"
    if a.action == b.action:
        return "same text, same region"
    if a.action[0] == b.action[0] and not a.candidate.region_written:
        return "same text, regions given"  # the policy acted alike; only its input differs
    if a.score is not None and b.score is not None and a.judges != b.judges:
        return "scored by different numbers of judges"  # the gap would partly be a gap between judges
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


def _balance_answers(
    pairs: Sequence[_EligiblePair], config: PairConfig, topics: Mapping[str, str], tally: _PairTally
) -> list[_EligiblePair]:
    """Drop surplus pairs until no frequent answer of a topic is chosen too much more often than it is rejected.

    Such pairs teach the answer itself, whatever the image shows: the policy then gives it from any region. As in
    _balance_pairs, a hash of seed and pair decides which of the pairs of two answers is dropped.
    """
    if config.max_answer_bias >= 1:
        return list(pairs)
    by_topic: dict[str, dict[str, dict[str, list[int]]]] = {}  # topic -> chosen answer -> rejected one -> positions
    for i in sorted(range(len(pairs)), key=lambda i: hash_json([config.seed, pairs[i].pair.id])):
        chosen, rejected = map(normalize_text, pairs[i].texts)
        if chosen != rejected:
            preferences = by_topic.setdefault(topics.get(pairs[i].pair.question, ""), {})
            preferences.setdefault(chosen, {}).setdefault(rejected, []).append(i)
    dropped: set[int] = set()
    for of_topic in by_topic.values():
        dropped.update(_drop_biased_pairs(of_topic, config.max_answer_bias))
    if dropped:
        tally.dropped["answer balance"] += len(dropped)
    return [pair for i, pair in enumerate(pairs) if i not in dropped]


def _drop_biased_pairs(preferences: dict[str, dict[str, list[int]]], max_bias: float) -> Iterator[int]:
    """Take the surplus pairs of frequent answers out of {chosen answer: {rejected answer: positions}}."""
    chosen, rejected = Counter[str](), Counter[str]()
    for better, of_better in preferences.items():
        for worse, positions in of_better.items():
            chosen[better] += len(positions)
            rejected[worse] += len(positions)
    frequent = sorted(answer for answer in chosen if chosen[answer] + rejected[answer] >= _FREQUENT_USES)

    def surplus(answer: str) -> int:
        return chosen[answer] - rejected[answer]

    while biased := [a for a in frequent if surplus(a) > max_bias * (chosen[a] + rejected[a])]:
        most = max(biased, key=surplus)
        # against the answer that is rejected most beyond being chosen, which comes nearer to balance too
        against = min((worse for worse, of_pair in preferences[most].items() if of_pair), key=lambda a: (surplus(a), a))
        chosen[most] -= 1
        rejected[against] -= 1
        yield preferences[most][against].pop()


def _balance_pairs(pairs: Sequence[_EligiblePair], config: PairConfig, tally: _PairTally) -> list[_EligiblePair]:
    """Drop surplus pairs, one at a time, until length balance and same_region_share are within bounds.

    A hash of seed and pair decides which surplus pair is dropped. Dropping the smallest gaps, for example, would make
    the gap depend on which side is longer.
    """
    order = sorted(range(len(pairs)), key=lambda i: hash_json([config.seed, pairs[i].pair.id]))
    # (rejected longer 1, shorter -1, equal 0; same region) -> ranks in `order`; the last rank is dropped first
    pools: _PairPools = {key: [] for key in product((1, 0, -1), (True, False))}
    for rank, i in enumerate(order):
        pools[pairs[i].longer, pairs[i].same_region].append(rank)
    while (surplus := _find_surplus(pools, config)) is not None:
        pool, reason = surplus
        pool.pop()
        tally.dropped[reason] += 1
    remaining = {order[rank] for rank in chain.from_iterable(pools.values())}
    return [pair for i, pair in enumerate(pairs) if i in remaining]


def _find_surplus(pools: _PairPools, config: PairConfig) -> tuple[list[int], str] | None:
    """The pool from which the next pair is dropped, and the reason; None if both limits hold.

    A pair dropped for one limit should not bring the other limit closer: otherwise the two limits would alternate until
    no pair is left.
    """
    n = sum(len(pool) for pool in pools.values())
    n_same = sum(len(pool) for (_, same), pool in pools.items() if same)
    excess = sum(longer * len(pool) for (longer, _), pool in pools.items())  # rejected longer minus chosen longer
    if n == 0:
        return None
    if abs(excess) > 2 * n * config.length_auc_tolerance:  # AUC - 0.5 = excess / 2n
        side = 1 if excess > 0 else -1
        same, different = pools[side, True], pools[side, False]
        # dropping a pair with different regions would leave too large a share of pairs with the same region
        if same and n_same > config.same_region_share * (n - 1):
            return same, "length balance"
        return max(same, different, key=lambda pool: pool[-1] if pool else -1), "length balance"
    if n_same > config.same_region_share * n:
        # prefer the longer side that is in excess, then equal lengths, so that the length balance does not suffer
        order = (0, 1, -1) if excess == 0 else (1, 0, -1) if excess > 0 else (-1, 0, 1)
        return next(pools[side, True] for side in order if pools[side, True]), "same_region_share reached"
    return None


def _compute_length_auc(lengths: Sequence[tuple[int, int]]) -> float | None:
    """AUC of "the longer side is the rejected one" over (chosen, rejected) lengths; ties count half."""
    if not lengths:
        return None
    wins = 0.0
    for chosen, rejected in lengths:
        wins += 1.0 if rejected > chosen else 0.5 if rejected == chosen else 0.0
    return wins / len(lengths)


def _round_gap(gap: float) -> float:
    """Round to 9 decimals before a comparison, so that 0.7 - 0.4 equals 0.3 and not 0.29999999999999993."""
    return round(gap, 9)


def _bin_gap(gap: float) -> str:
    """Lower edge of the gap's bin, 0.1 wide."""
    return f"{math.floor(_round_gap(gap * 10)) / 10:.1f}"


class _PairTally:
    """Running counts for the report."""

    def __init__(self) -> None:
        self.questions = self.candidates = self.unscored = self.chains_cut = self.considered = 0
        self.dropped: Counter[str] = Counter()
        self.gaps: Counter[str] = Counter()

    def build_report(self, pairs: Sequence[_EligiblePair], *, auc_before: float | None, tolerance: float) -> PairReport:
        """The report on the final pairs; `auc_before` is the length AUC before balancing."""
        gaps_kept = Counter(_bin_gap(_round_gap(pair.pair.gap)) for pair in pairs)
        return PairReport(
            questions=self.questions,
            questions_with_pairs=len({pair.pair.question for pair in pairs}),
            candidates=self.candidates,
            candidates_unscored=self.unscored,
            chains_cut=self.chains_cut,
            considered=self.considered,
            dropped=dict(sorted(self.dropped.items())),
            pairs=len(pairs),
            same_region=sum(pair.same_region for pair in pairs),
            same_text=sum(len(set(pair.texts)) == 1 for pair in pairs),
            written=sum(pair.written for pair in pairs),
            longer_rejected_auc_before=auc_before,
            longer_rejected_auc=_compute_length_auc([pair.chars for pair in pairs]),
            length_auc_tolerance=tolerance,
            longer_rejected_auc_tokens=_compute_length_auc([pair.tokens for pair in pairs]),
            mean_chosen_chars=sum(pair.chars[0] for pair in pairs) / len(pairs) if pairs else None,
            mean_rejected_chars=sum(pair.chars[1] for pair in pairs) / len(pairs) if pairs else None,
            contradictions=_count_contradictions(pairs),
            gaps_considered=_sort_bins(self.gaps),
            gaps_kept=_sort_bins(gaps_kept),
        )


def _count_contradictions(pairs: Sequence[_EligiblePair]) -> int:
    """Count the pairs whose texts another pair of the question prefers the other way round.

    One text may score differently in two regions, so a few contradictions are normal; with many of them there is no
    consistent answer to learn.
    """
    orders = {(pair.pair.question, pair.pair.step, *pair.texts) for pair in pairs}
    return sum(
        (pair.pair.question, pair.pair.step, *reversed(pair.texts)) in orders
        for pair in pairs
        if len(set(pair.texts)) > 1
    )


def _sort_bins(bins: Counter[str]) -> dict[str, int]:
    return dict(sorted(bins.items(), key=lambda item: float(item[0])))
