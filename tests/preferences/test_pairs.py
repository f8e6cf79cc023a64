import random

import pytest

from clincot.config import PairConfig
from clincot.geometry import WHOLE_IMAGE
from clincot.jsonl import write_records
from clincot.preferences.pairs import BadPairInput, NoPairs, PairReport, make_pairs
from clincot.records import Candidate, PreferencePair
from tests.support.judging_builders import LEFT, RIGHT, candidate, score_of

# All pairs of a question, whatever their length or region: what a test is not about stays out of its way.
OPEN = {"per_question": 100, "pick": "top", "length_auc_tolerance": 0.5, "same_region_share": 1.0}


def pairs_of(scored, **config) -> tuple[list[PreferencePair], PairReport]:
    """make_pairs over [(candidate, score)]."""
    return make_pairs(
        [one for one, _ in scored],
        [score_of(one, score) for one, score in scored],
        PairConfig(**{**OPEN, **config}),
    )


def texts(pairs: list[PreferencePair], scored: list[tuple[Candidate, float | None]]) -> list[tuple[str, str]]:
    text_of = {one.id: one.text for one, _ in scored}
    return [(text_of[pair.chosen], text_of[pair.rejected]) for pair in pairs]


def accounted(report: PairReport) -> bool:
    return report.considered == report.pairs + sum(report.dropped.values())


def test_every_gap_of_min_gap_is_a_pair_better_first():
    """Scores .9, .7, .4: gaps .2, .5, .3; 0.7 - 0.4 is 0.29999999999999993 in binary and counts as .3."""
    scored = [(candidate("left"), 0.9), (candidate("both"), 0.7), (candidate("right"), 0.4)]
    pairs, report = pairs_of(scored, min_gap=0.3)
    assert texts(pairs, scored) == [("left", "right"), ("both", "right")]
    first = pairs[0]
    assert (first.question, first.chosen_region, first.step) == ("question-1", scored[0][0].region, 0)
    assert (first.chosen_score, first.rejected_score) == (0.9, 0.4)
    assert first.gap == pytest.approx(0.5)
    assert report.considered == 3
    assert report.dropped == {"gap below min_gap": 1}
    assert report.gaps_considered == {"0.2": 1, "0.3": 1, "0.5": 1}
    assert report.gaps_kept == {"0.3": 1, "0.5": 1}
    assert accounted(report)


def test_the_spread_of_a_pair_is_the_mean_of_its_sides():
    one, other = candidate("yes"), candidate("no")
    scores = [score_of(one, 0.9, spread=0.1), score_of(other, 0.1, spread=0.3)]
    pairs, _ = make_pairs([one, other], scores, PairConfig(**OPEN))
    assert pairs[0].spread == pytest.approx(0.2)


def test_questions_and_steps_do_not_mix():
    """Four candidates, two questions: 1 combination in each, not 6. Steps 0 and 1 of a question: none."""
    scored = [
        (candidate("yes", question="a"), 0.9),
        (candidate("no", question="a"), 0.1),
        (candidate("yes", question="b"), 0.2),
        (candidate("no", question="b"), 0.8),
    ]
    pairs, report = pairs_of(scored)
    assert [pair.question for pair in pairs] == ["a", "b"]
    assert (report.considered, report.questions, report.questions_with_pairs) == (2, 2, 2)
    first = candidate("yes")
    with pytest.raises(NoPairs) as nothing:
        pairs_of([(first, 0.9), (candidate("no", step=1, parent=first.id), 0.1)])
    assert nothing.value.report.considered == 0


def test_a_written_region_is_not_paired_with_a_given_one():
    """The loss counts region tokens only where the policy wrote them: one side would be longer by a region."""
    scored = [
        (candidate("yes", written=True), 0.9),
        (candidate("no", written=False), 0.1),
        (candidate("no", written=True, box=RIGHT), 0.2),
        (candidate("yes", written=False, box=RIGHT), 0.8),
    ]
    pairs, report = pairs_of(scored)
    chosen_to_rejected = [(pair.chosen, pair.rejected) for pair in pairs]
    assert sorted(chosen_to_rejected) == sorted(
        [(scored[0][0].id, scored[2][0].id), (scored[3][0].id, scored[1][0].id)]
    )
    assert report.dropped == {"region written on one side only": 4}
    assert report.written == 1
    assert accounted(report)


def test_a_different_context_is_another_situation():
    parents = [candidate("yes"), candidate("no")]
    scored = [
        (parents[0], 0.5),
        (parents[1], 0.5),
        (candidate("left", step=1, parent=parents[0].id), 0.9),
        (candidate("right", step=1, parent=parents[1].id), 0.1),
    ]
    with pytest.raises(NoPairs) as nothing:
        pairs_of(scored, gamma=0)
    assert nothing.value.report.dropped == {"different context": 1, "gap below min_gap": 1}


def test_equal_texts_pair_only_with_written_regions():
    """Given regions: the policy did the same thing twice. Written ones: where it looked is what it did."""
    given = [(candidate("yes", box=LEFT), 0.9), (candidate("yes ", box=RIGHT), 0.1)]
    with pytest.raises(NoPairs) as nothing:
        pairs_of(given)
    assert nothing.value.report.dropped == {"same text, regions given": 1}
    written = [(candidate("yes", box=LEFT, written=True), 0.9), (candidate("yes", box=RIGHT, written=True), 0.1)]
    pairs, report = pairs_of(written)
    assert (len(pairs), report.same_region, report.written) == (1, 0, 1)


@pytest.mark.parametrize("written", [True, False])
def test_the_same_text_and_region_is_no_pair(written):
    scored = [(candidate("yes", seed=1, written=written), 0.9), (candidate("yes", seed=2, written=written), 0.1)]
    with pytest.raises(NoPairs) as nothing:
        pairs_of(scored)
    assert nothing.value.report.dropped == {"same text, same region": 1}


def test_two_equal_actions_do_not_make_two_equal_pairs():
    """ "yes" was sampled twice from one region: (yes, no) is one training row, not two."""
    scored = [(candidate("yes", seed=1), 0.9), (candidate("yes", seed=2), 0.9), (candidate("no"), 0.1)]
    pairs, report = pairs_of(scored)
    assert len(pairs) == 1
    assert report.dropped == {"same text, same region": 1, "duplicate of another pair": 1}
    assert accounted(report)


def test_unscored_candidates_are_in_no_pair_and_counted():
    scored = [(candidate("yes"), 0.9), (candidate("no"), None), (candidate("maybe"), 0.2)]
    pairs, report = pairs_of(scored)
    assert texts(pairs, scored) == [("yes", "maybe")]
    assert report.dropped == {"unscored": 2}
    assert report.candidates_unscored == 1


def test_sides_need_the_same_number_of_judges():
    """Candidates that different numbers of judges scored are not compared."""
    one, other = candidate("yes"), candidate("no")
    with pytest.raises(NoPairs) as nothing:
        make_pairs([one, other], [score_of(one, 0.9, judges=3), score_of(other, 0.1, judges=2)], PairConfig(**OPEN))
    assert nothing.value.report.dropped == {"scored by different numbers of judges": 1}


def test_an_empty_answer_is_an_answer():
    pairs, _ = pairs_of([(candidate("yes"), 0.9), (candidate(""), 0.0)])
    assert len(pairs) == 1


def chain(gamma: float, *, second_continued: bool = True, second_child: float | None = 0.4):
    """A step of two candidates (.6 and .5); the first leads to .2 and .4, the second to .4 (or is not continued)."""
    first, second = candidate("left"), candidate("right")
    scored = [(first, 0.6), (second, 0.5)]
    scored += [(candidate(t, step=1, parent=first.id), s) for t, s in (("a", 0.2), ("b", 0.4))]
    if second_continued:
        scored.append((candidate("c", step=1, parent=second.id), second_child))
    return scored, pairs_of(scored, gamma=gamma, min_gap=0.05)


def test_a_candidate_is_worth_what_it_leads_to():
    """gamma 2: left .6 + 2 (.2 + .4)/2 = 1.2, right .5 + 2 * .4 = 1.3: the order turns."""
    scored, (pairs, report) = chain(2.0)
    step_0 = [pair for pair in pairs if pair.step == 0]
    assert texts(step_0, scored) == [("right", "left")]
    assert step_0[0].chosen_score == pytest.approx(1.3)
    assert step_0[0].rejected_score == pytest.approx(1.2)
    assert [texts([pair], scored)[0] for pair in pairs if pair.step == 1] == [("b", "a")]
    assert report.dropped == {"different context": 2}  # (a, c) and (b, c) continue different candidates
    assert report.chains_cut == 0


def test_gamma_0_is_no_chain():
    scored, (pairs, _) = chain(0.0)
    assert texts(pairs, scored)[:1] == [("b", "a")]
    assert ("left", "right") in texts(pairs, scored)


def test_being_continued_is_not_rewarded():
    """Only the best candidate was continued: with the term it would score .6 + .3 against .5 for that alone."""
    scored, (pairs, report) = chain(1.0, second_continued=False)
    (step_0,) = [pair for pair in pairs if pair.step == 0]
    assert (step_0.chosen_score, step_0.rejected_score) == (0.6, 0.5)
    assert report.chains_cut == 1
    assert texts([step_0], scored) == [("left", "right")]


def test_an_unscored_continuation_leaves_its_parent_unscored():
    _, (pairs, report) = chain(1.0, second_child=None)
    assert [pair.step for pair in pairs] == [1]
    assert report.candidates_unscored == 2  # the continuation, and the candidate that it continues


def many(questions: int, per_question: int = 6, seed: int = 0) -> list[tuple[Candidate, float]]:
    """Questions with candidates of random scores, lengths and regions."""
    rng = random.Random(seed)
    words = ["left", "right", "an opacity", "effusion on the left", "no", "yes", "two nodules"]
    return [
        (candidate(text, question=f"question-{q:03}", box=rng.choice([LEFT, RIGHT]), seed=n), rng.random())
        for q in range(questions)
        for n, text in enumerate(rng.sample(words, per_question))
    ]


def test_at_most_k_a_question_the_largest_gaps_or_any():
    scored = [(candidate(t), s) for t, s in (("a", 1.0), ("b", 0.8), ("c", 0.4), ("d", 0.0))]
    top, report = pairs_of(scored, per_question=2, pick="top")
    assert texts(top, scored) == [("a", "d"), ("b", "d")]  # gaps 1 and .8; then a-c .6, b-c .4, c-d .4
    assert report.dropped == {"gap below min_gap": 1, "beyond per_question": 3}
    picks = {tuple(texts(pairs_of(scored, per_question=2, pick="random", seed=seed)[0], scored)) for seed in range(40)}
    assert all(len(pick) == 2 for pick in picks)
    assert len(picks) > 10  # 5 eligible pairs, 20 ordered picks of two


def test_a_question_is_picked_from_without_regard_to_the_others():
    both = many(2)
    alone, _ = pairs_of([row for row in both if row[0].question == "question-001"], pick="random", per_question=2)
    together, _ = pairs_of(both, pick="random", per_question=2)
    assert [pair.id for pair in together if pair.question == "question-001"] == [pair.id for pair in alone]


def test_longer_is_rejected_by_hand():
    """Rejected longer, shorter, equal: (1 + 0 + 1/2) / 3 = 1/2; token counts are words + 1."""
    scored = []
    for n, (good, bad) in enumerate([("no", "an opacity"), ("effusion", "no"), ("left", "both")]):
        scored += [(candidate(good, question=f"q{n}"), 0.9), (candidate(bad, question=f"q{n}"), 0.1)]
    _, report = pairs_of(scored, length_auc_tolerance=0.05)
    assert report.longer_rejected_auc == 0.5
    assert report.longer_rejected_auc_tokens == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert report.mean_chosen_chars == pytest.approx((2 + 8 + 4) / 3)
    assert report.mean_rejected_chars == pytest.approx((10 + 2 + 4) / 3)


def lopsided(longer: int, shorter: int, equal: int) -> list[tuple[Candidate, float]]:
    """So many questions whose rejected answer is longer, shorter, equally long."""
    sides = [("no", "yes")] * longer + [("yes", "no")] * shorter + [("left", "both")] * equal
    return [
        (candidate(text, question=f"question-{n:03}"), score)
        for n, (good, bad) in enumerate(sides)
        for text, score in ((good, 0.9), (bad, 0.1))
    ]


@pytest.mark.parametrize("turn", [False, True])
def test_length_is_balanced_by_dropping_no_more_than_needed(turn):
    """30 longer, 10 shorter, 4 equal: AUC (30 + 2)/44 = .727. With L longer ones left (L + 2)/(L + 14) <= .55
    means .45 L <= 5.7, so L = 12: 18 are dropped. The mirror image is dropped likewise."""
    pairs, report = pairs_of(lopsided(*((10, 30) if turn else (30, 10)), 4), length_auc_tolerance=0.05)
    before, after = 32 / 44, 14 / 26
    assert report.longer_rejected_auc_before == pytest.approx(1 - before if turn else before)
    assert report.longer_rejected_auc == pytest.approx(1 - after if turn else after)
    assert report.dropped == {"length balance": 18}
    assert len(pairs) == 26
    assert accounted(report)


def test_what_is_balanced_away_does_not_depend_on_the_gap():
    """Dropping the smallest gaps would leave larger gaps on the longer side. Gaps .3 … .9 of 200 surplus pairs:
    the mean gap of what stays is that of what was there, within 4 standard errors (.18/sqrt(50) = .025)."""
    rng = random.Random(3)
    scored = []
    for n in range(250):
        good, bad = ("no", "yes") if n < 200 else ("yes", "no")
        gap = rng.uniform(0.3, 0.9)
        scored += [(candidate(good, question=f"q{n:03}"), 0.05 + gap), (candidate(bad, question=f"q{n:03}"), 0.05)]
    longer = {one.id for one, _ in scored if one.text == "no"}
    everything, _ = pairs_of(scored)
    balanced, report = pairs_of(scored, length_auc_tolerance=0.0)
    mean_before = sum(p.gap for p in everything if p.chosen in longer) / 200
    kept = [p.gap for p in balanced if p.chosen in longer]
    assert len(kept) == 50
    assert report.longer_rejected_auc == 0.5
    assert sum(kept) / 50 == pytest.approx(mean_before, abs=0.1)


def test_balance_fails_if_rejected_is_always_longer():
    """No balance is possible if the rejected side is always longer."""
    with pytest.raises(
        NoPairs, match=r"no preference pair left of 5 combinations of 10 candidates.*'length balance': 5"
    ):
        pairs_of(lopsided(5, 0, 0), length_auc_tolerance=0.05)


def test_same_region_pairs_keep_to_their_share():
    """Pairs that differ only in the answer keep to same_region_share."""
    scored = many(60)
    free, unlimited = pairs_of(scored, per_question=2, pick="random")
    pairs, report = pairs_of(scored, per_question=2, pick="random", same_region_share=0.25)
    assert unlimited.same_region > 0.35 * len(free)
    assert 0 < report.same_region <= 0.25 * report.pairs
    assert len(pairs) > 0.9 * len(free)  # a refused pair makes room for another of its question
    assert accounted(report)
    only_regions, report = pairs_of(scored, same_region_share=0.0)
    assert report.same_region == 0
    assert all(pair.chosen_region != pair.rejected_region for pair in only_regions)


def test_both_limits_hold_together():
    pairs, report = pairs_of(many(200), per_question=2, same_region_share=0.2, length_auc_tolerance=0.02)
    assert report.longer_rejected_auc == pytest.approx(0.5, abs=0.02 + 1e-12)
    assert report.same_region <= 0.2 * len(pairs)
    assert len(pairs) > 200
    assert accounted(report)


def test_length_balance_keeps_the_share_within_its_limit():
    """12 pairs of two regions, all rejected longer, and 12 of one region, 4 rejected shorter and 8 equal: half and
    half. Balancing length alone would drop 8 of the first kind and leave 12 of 16 in one region; the most that both
    limits leave is 4 and 4. An earlier version took pairs of one region at random, then had to balance length
    again, and so on to the last pair."""
    scored = []
    kinds = [("no", "yes", RIGHT), ("yes", "no", LEFT)] * 4 + [("no", "yes", RIGHT), ("left", "both", LEFT)] * 8
    for n, (good, bad, bad_box) in enumerate(kinds):
        question = f"question-{n:03}"
        scored += [(candidate(good, question=question), 0.9), (candidate(bad, question=question, box=bad_box), 0.1)]
    pairs, report = pairs_of(scored, same_region_share=0.5, length_auc_tolerance=0.0)
    assert report.longer_rejected_auc_before == (12 + 8 / 2) / 24
    assert report.longer_rejected_auc == 0.5
    assert (len(pairs), report.same_region) == (8, 4)
    assert accounted(report)


@pytest.mark.parametrize("seed", range(20))
def test_two_limits_drop_no_more_than_one_if_possible(seed):
    """Rejected longer: 10 of two regions and 5 of one; shorter: 5 of two. Length needs 5 and 5, so 10 are dropped;
    the share of one region (5/20, the limit) is kept by taking enough of them from the 5."""
    scored = []
    kinds = [("no", "yes", RIGHT), ("no", "yes", RIGHT), ("yes", "no", RIGHT), ("no", "yes", LEFT)] * 5
    for n, (good, bad, bad_box) in enumerate(kinds):
        question = f"question-{n:03}"
        scored += [(candidate(good, question=question), 0.9), (candidate(bad, question=question, box=bad_box), 0.1)]
    pairs, report = pairs_of(scored, same_region_share=0.25, length_auc_tolerance=0.0, seed=seed)
    assert len(pairs) == 10
    assert report.same_region <= 2
    assert report.dropped == {"length balance": 10}


def test_random_picks_differ_between_questions():
    """Forty questions with the same candidates: no position in the file is preferred everywhere."""
    scored = [
        (candidate(text, question=f"question-{q:02}"), score)
        for q in range(40)
        for text, score in (("a", 1.0), ("b", 0.6), ("c", 0.2))
    ]
    pairs, _ = pairs_of(scored, pick="random", per_question=1)
    assert {texts([pair], scored)[0] for pair in pairs} == {("a", "b"), ("a", "c"), ("b", "c")}


def test_same_input_config_and_seed_same_bytes(tmp_path):
    config = {"per_question": 2, "pick": "random", "length_auc_tolerance": 0.05, "same_region_share": 0.5}
    files = []
    for n, seed in enumerate((0, 0, 1)):
        pairs, report = pairs_of(many(50), seed=seed, **config)
        write_records(tmp_path / f"{n}.jsonl", pairs)
        files.append((tmp_path / f"{n}.jsonl").read_bytes() + report.model_dump_json().encode())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_pairs_come_in_question_order():
    pairs, _ = pairs_of(many(50), pick="random", per_question=2, length_auc_tolerance=0.05)
    questions = [pair.question for pair in pairs]
    assert questions == sorted(questions)


def test_candidates_are_streamed():
    """A score out of place at the 13th candidate stops there: nothing was read ahead."""
    scored = many(100)
    read = 0

    def lines():
        nonlocal read
        for one, _ in scored:
            read += 1
            yield one

    def bad_scores():
        for n, (one, score) in enumerate(scored):
            yield score_of(one if n != 12 else scored[0][0], score)

    with pytest.raises(BadPairInput):
        make_pairs(lines(), bad_scores(), PairConfig(**OPEN))
    assert read == 13


def test_files_that_do_not_belong_together_are_refused():
    one, other = candidate("yes"), candidate("no")
    config = PairConfig(**OPEN)
    with pytest.raises(BadPairInput, match=f"the scores end before {other.id}"):
        make_pairs([one, other], [score_of(one, 0.9)], config)
    with pytest.raises(BadPairInput, match=f"the score of {other.id} has no candidate"):
        make_pairs([one], [score_of(one, 0.9), score_of(other, 0.1)], config)
    with pytest.raises(BadPairInput, match=f"expected the score of {one.id}, got the one of {other.id}"):
        make_pairs([one, other], [score_of(other, 0.1), score_of(one, 0.9)], config)
    with pytest.raises(BadPairInput, match="no candidates to pair"):
        make_pairs([], [], config)
    orphan = candidate("no", step=1, parent="candidate-gone")
    with pytest.raises(BadPairInput, match=f"{orphan.id} continues candidate-gone"):
        pairs_of([(one, 0.9), (orphan, 0.1)])
    scattered = [(candidate("yes", question=q, seed=n), 0.5) for n, q in enumerate("aba")]
    with pytest.raises(BadPairInput, match="candidates of a are not consecutive"):
        pairs_of(scattered)


def test_whole_image_and_crop_are_different_regions():
    scored = [(candidate("yes", box=WHOLE_IMAGE), 0.9), (candidate("no", box=LEFT), 0.1)]
    _, report = pairs_of(scored)
    assert report.same_region == 0


def preferred(chosen: str, rejected: str, count: int, topic: str) -> list[tuple[Candidate, float]]:
    """Two candidates in each of `count` questions: `chosen` scores .9, `rejected` .1."""
    scored = []
    for number in range(count):
        question = f"{topic} {chosen} {rejected} {number:03d}"
        scored += [(candidate(chosen, question=question), 0.9), (candidate(rejected, question=question), 0.1)]
    return scored


def test_an_answer_that_is_nearly_always_chosen_loses_pairs_until_it_is_no_habit():
    """Smooth is chosen 30 times and rejected 10 times: a bias of 20/40.

    After 18 drops it is chosen 12 times: 2/22 is at most .1, while 3/23 after 17 is not.
    """
    scored = preferred("smooth", "spiculated", 30, "margin") + preferred("Spiculated", "smooth", 10, "margin")
    assert len(pairs_of(scored)[0]) == 40
    pairs, report = pairs_of(scored, max_answer_bias=0.1)
    chosen = [better for better, _ in texts(pairs, scored)]
    assert (chosen.count("smooth"), chosen.count("Spiculated")) == (12, 10)
    assert report.dropped == {"answer balance": 18}
    assert accounted(report)


def test_a_rare_answer_is_no_habit():
    """Chosen in 19 pairs and never rejected, it is below the 20 uses from which an answer is balanced."""
    scored = preferred("smooth", "spiculated", 19, "margin")
    assert len(pairs_of(scored, max_answer_bias=0.1)[0]) == 19
    with pytest.raises(NoPairs, match="'answer balance': 20"):
        pairs_of(preferred("smooth", "spiculated", 20, "margin"), max_answer_bias=0.1)


def test_answers_are_balanced_within_their_topic():
    """Yes is chosen 20 times of presence and rejected 20 times of side: balanced together, a habit in each."""
    scored = preferred("yes", "no", 20, "presence") + preferred("no", "yes", 20, "side")
    ones, scores = [one for one, _ in scored], [score_of(one, score) for one, score in scored]
    config = PairConfig(**{**OPEN, "max_answer_bias": 0.1})
    assert len(make_pairs(ones, scores, config)[0]) == 40
    topics = {one.question: one.question.partition(" ")[0] for one in ones}
    with pytest.raises(NoPairs, match="'answer balance': 40"):
        make_pairs(ones, scores, config, topics=topics)


def test_pairs_of_the_most_rejected_answer_are_dropped_first_and_the_seed_chooses_among_them():
    """Smooth is chosen 20 times over spiculated, which is never chosen, and 20 times over cavitating, chosen 20 times.

    Its surplus falls from 40 to that of a bias of at most .5: 40 - k <= .5 (40 - k) needs all 40 gone, but once
    cavitating is chosen over smooth 20 times, smooth is rejected 20 times: 20 - k <= .5 (60 - k) holds at once.
    """
    scored = preferred("smooth", "spiculated", 20, "margin") + preferred("smooth", "cavitating", 20, "margin")
    scored += preferred("cavitating", "smooth", 20, "margin")
    assert len(pairs_of(scored, max_answer_bias=0.5)[0]) == 60
    # at most .2: 20 - k <= .2 (60 - k) from k = 10 on
    first, report = pairs_of(scored, max_answer_bias=0.2)
    assert report.dropped == {"answer balance": 10}
    assert texts(first, scored).count(("smooth", "spiculated")) == 10
    other, _ = pairs_of(scored, max_answer_bias=0.2, seed=1)
    assert [pair.id for pair in other] != [pair.id for pair in first]
    assert [pair.id for pair in first] == [pair.id for pair in pairs_of(scored, max_answer_bias=0.2)[0]]
