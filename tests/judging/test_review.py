"""People as judges: which pairs they get, how their answers are hidden, and what their verdicts do."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clincot.errors import InvalidInput
from clincot.geometry import WHOLE_IMAGE, box_from_xyxy
from clincot.judging.calibration import CalibrationRefused
from clincot.judging.label_studio import LABELING_CONFIG, build_task, read_annotations
from clincot.judging.people_verdicts import PeopleJudge, ReaderVerdict
from clincot.judging.review_queue import ReviewItem, select_review_items
from clincot.records import PreferencePair


def pair_of(
    number: int, *, chosen: float = 0.9, gap: float = 0.1, spread: float = 0.0, step: int = 0
) -> PreferencePair:
    return PreferencePair(
        question=f"question-{number}",
        chosen=f"good-{number}",
        rejected=f"bad-{number}",
        chosen_region="region-1",
        rejected_region="region-2",
        chosen_score=chosen,
        rejected_score=chosen - gap,
        spread=spread,
        step=step,
    )


def scores_of(pairs: list[PreferencePair]) -> dict[str, float]:
    return {pair.chosen: pair.chosen_score for pair in pairs} | {pair.rejected: pair.rejected_score for pair in pairs}


# The queue


def test_the_budget_goes_to_each_kind_in_turn() -> None:
    """Pair 0 has a score of 0.5, pair 1 the largest spread, pair 2 the largest gap; the other 97 are alike."""
    pairs = [pair_of(0, chosen=0.6, gap=0.1), pair_of(1, spread=0.4), pair_of(2, chosen=0.99, gap=0.9)]
    pairs += [pair_of(number) for number in range(3, 100)]
    items = select_review_items(pairs, scores_of(pairs), budget=4, seed=0)
    reasons = {item.question: item.reason for item in items}
    special = {f"question-{number}": reasons.pop(f"question-{number}") for number in range(3)}
    assert special == {"question-0": "uncertain", "question-1": "contested", "question-2": "high_gap"}
    assert list(reasons.values()) == ["random"]
    more = select_review_items(pairs, scores_of(pairs), budget=40, seed=0)
    assert Counter(item.reason for item in more) == dict.fromkeys(("uncertain", "contested", "high_gap", "random"), 10)


def test_a_question_is_asked_once_and_later_steps_are_not() -> None:
    first = pair_of(1)
    other = first.model_copy(update={"id": "", "rejected": "worse-1"})
    pairs = [first, PreferencePair(**other.model_dump()), pair_of(2), pair_of(3, step=1)]
    items = select_review_items(pairs, scores_of(pairs), budget=10, seed=0)
    assert sorted(item.question for item in items) == ["question-1", "question-2"]


def test_nothing_in_the_order_tells_which_answer_the_panel_prefers() -> None:
    """Answer A is the chosen one in about half of 400 tasks (20 is 2 sd); reasons are not sorted; seeds differ."""
    pairs = [pair_of(number) for number in range(400)]
    items = select_review_items(pairs, scores_of(pairs), budget=400, seed=0)
    assert abs(sum(item.answer_a.startswith("good") for item in items) - 200) < 30
    assert [item.task for item in items] == sorted(item.task for item in items)
    assert len({item.reason for item in items[:20]}) == 4
    again = select_review_items(pairs, scores_of(pairs), budget=400, seed=0)
    assert again == items
    assert select_review_items(pairs, scores_of(pairs), budget=400, seed=1) != items


def test_a_round_without_pairs_has_nothing_to_review() -> None:
    with pytest.raises(InvalidInput, match="no pairs to review"):
        select_review_items([], {}, budget=10, seed=0)


# Label Studio's formats

ITEM = ReviewItem(task="review-1", pair="p", question="q", answer_a="bad-1", answer_b="good-1", reason="random")


def test_a_task_shows_picture_regions_and_answers_and_nothing_else() -> None:
    """x 25 %, y 0, width 50 %, height 25 %; the whole image of answer B is not drawn."""
    boxes = {"bad-1": box_from_xyxy((0.25, 0.0, 0.75, 0.25)), "good-1": WHOLE_IMAGE}
    task = build_task(ITEM, "Fluid?", "https://pacs/1.png", {"bad-1": "no", "good-1": ""}, boxes)
    assert task["data"] == {
        "task": "review-1",
        "image": "https://pacs/1.png",
        "question": "Fluid?",
        "answer_a": "no",
        "answer_b": "(an empty answer)",
    }
    (region,) = task["predictions"][0]["result"]
    assert region["value"] == {
        "x": 25.0,
        "y": 0.0,
        "width": 50.0,
        "height": 25.0,
        "rotation": 0,
        "rectanglelabels": ["A"],
    }


def test_the_labeling_config_shows_every_field_of_a_task() -> None:
    root = ET.fromstring(LABELING_CONFIG)
    shown = {element.get("value", "") for element in root.iter() if element.get("value", "").startswith("$")}
    assert shown == {"$question", "$image", "$answer_a", "$answer_b"}
    required = [element.get("name") for element in root.iter("Choices") if element.get("required") == "true"]
    assert required == ["a", "b", "better"]


def annotation(number: int, reader: Any, *choices: str, cancelled: bool = False) -> dict[str, Any]:
    """As Label Studio 1.23 exports it, with the region that was a prediction among the results."""
    controls = zip(("a", "b", "better"), choices, strict=False)
    result: list[dict[str, Any]] = [
        {"from_name": name, "to_name": "image", "type": "choices", "value": {"choices": [choice]}}
        for name, choice in controls
    ]
    region = {"from_name": "regions", "to_name": "image", "type": "rectanglelabels", "value": {"x": 1.0}}
    return {"id": number, "completed_by": reader, "was_cancelled": cancelled, "result": [*result, region]}


def export(folder: Path, *annotations: dict[str, Any], task: str = "review-1") -> Path:
    path = folder / "export.json"
    path.write_text(json.dumps([{"id": 7, "data": {"task": task, "image": "…"}, "annotations": list(annotations)}]))
    return path


def test_the_last_annotation_of_each_reader_counts(tmp_path: Path) -> None:
    path = export(
        tmp_path,
        annotation(5, 1, "A is wrong", "B: unsure", "B is better"),
        annotation(4, 1, "A is right", "B is right", "no difference"),
        annotation(6, {"id": 2, "email": "x"}, "A is right", "B is wrong", "A is better"),
        annotation(8, 3, cancelled=True),
    )
    assert read_annotations(path) == [
        ReaderVerdict(task="review-1", reader="1", a_right=False, b_right=None, better="b"),
        ReaderVerdict(task="review-1", reader="2", a_right=True, b_right=False, better="a"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tasks": []}, "a list of tasks, got dict"),
        ([{"id": 7, "a": "A is right"}], "not JSON_MIN or CSV"),
        ([{"data": {"task": "t"}, "annotations": [annotation(1, 1, "A is right")]}], "got None"),
        (
            [{"data": {"task": "t"}, "annotations": [annotation(1, 1, "Yes", "B is right", "A is better")]}],
            "got ['Yes']",
        ),
    ],
)
def test_another_export_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "export.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput) as caught:
        read_annotations(tmp_path / "export.json")
    assert message in str(caught.value)


# Verdicts


def judge(verdicts: list[tuple[int, str, bool | None, bool | None, str]], pairs: list[PreferencePair]) -> PeopleJudge:
    """Verdicts as (pair, reader, chosen is right, rejected is right, better: chosen, rejected or equal).

    The chosen answer is A in even tasks and B in odd ones.
    """
    items, given = [], []
    for number, pair in enumerate(pairs):
        shown = (pair.chosen, pair.rejected) if number % 2 == 0 else (pair.rejected, pair.chosen)
        items.append(
            ReviewItem(
                task=f"review-{number}",
                pair=pair.id,
                question=pair.question,
                answer_a=shown[0],
                answer_b=shown[1],
                reason="random",
            )
        )
    for number, reader, chosen, rejected, better in verdicts:
        a, b = (chosen, rejected) if number % 2 == 0 else (rejected, chosen)
        names = {"chosen": "ab"[number % 2], "rejected": "ba"[number % 2], "equal": "equal"}
        given.append(
            ReaderVerdict.model_validate(
                {"task": f"review-{number}", "reader": reader, "a_right": a, "b_right": b, "better": names[better]}
            )
        )
    return PeopleJudge(items, given, "instructions")


PAIRS = [pair_of(number) for number in range(5)]


def test_verdicts_become_judgements_of_one_more_judge() -> None:
    """Two of three readers call the chosen answer of pair 1 right: 2/3. All are unsure about the other: None."""
    people = judge(
        [
            (1, "x", True, None, "chosen"),
            (1, "y", True, None, "chosen"),
            (1, "z", False, None, "equal"),
            (0, "x", True, False, "chosen"),
        ],
        PAIRS,
    )
    found = {one.candidate: (one.score, one.reason) for one in people.build_judgements()}
    assert found == {
        "good-1": (2 / 3, ""),
        "bad-1": (None, "every reader is unsure"),
        "good-0": (1.0, ""),
        "bad-0": (0.0, ""),
    }
    assert {one.judge for one in people.build_judgements()} == {people.digest}
    fewer = judge([(0, "x", True, False, "chosen")], PAIRS)
    assert fewer.digest != people.digest  # other readers are another judge
    assert fewer.prompt == people.prompt


def test_a_majority_vetoes_a_pair() -> None:
    people = judge(
        [
            (0, "x", True, False, "chosen"),
            (1, "x", True, True, "rejected"),  # 1 to 0 against the order
            (2, "x", True, True, "rejected"),
            (2, "y", True, True, "chosen"),  # 1 to 1: no veto
            (3, "x", False, False, "chosen"),  # better, but wrong
        ],
        PAIRS,
    )
    assert {pair.pair: pair.veto for pair in people.review_pairs(PAIRS)} == {
        PAIRS[0].id: "",
        PAIRS[1].id: "readers prefer the rejected answer",
        PAIRS[2].id: "",
        PAIRS[3].id: "readers call the chosen answer wrong",
    }


def test_the_report_compares_people_with_the_panel() -> None:
    """Scores: the panel says 0.9 and 0.8 everywhere, so right. Of eight candidates people call four right.

    Order: same for pairs 0 and 1, opposite for 2, no difference for 3. Judge `sharp` gives people's scores: alpha 1.
    """
    people = judge(
        [
            (0, "x", True, False, "chosen"),
            (1, "x", True, False, "chosen"),
            (2, "x", False, True, "rejected"),
            (3, "x", True, False, "equal"),
        ],
        PAIRS,
    )
    own = {one.candidate: one.score for one in people.build_judgements() if one.score is not None}
    report = people.compare(scores_of(PAIRS), {"sharp": own}, people.review_pairs(PAIRS))
    panel, sharp = report.judges
    assert panel.confusion.model_dump() == {
        "both_right": 4,
        "both_wrong": 0,
        "only_judge_right": 4,
        "only_people_right": 0,
        "undecided": 0,
    }
    assert panel.alpha.value is not None
    assert panel.alpha.value < 0.1
    assert (sharp.alpha.value, sharp.confusion.both_right, sharp.confusion.both_wrong) == (1.0, 4, 4)
    (order,) = report.orders
    assert (order.same, order.opposite, order.no_difference) == (2, 1, 1)
    assert (report.readers, report.tasks, report.reviewed) == (1, 5, 4)
    assert report.readers_alpha.value is None  # a single reader


def test_readers_agreement_is_krippendorffs_alpha() -> None:
    """Two readers, values 1 1 | 0 0 | 1 0 | 0 0: D_o = 2/8 x 2 x 0.5 = 0.25, and D_e = 2/7 x SS with three ones of
    eight, SS = 8 x 3/8 x 5/8 = 1.875: alpha = 1 - 0.25 / 0.5357 = 0.5333."""
    people = judge(
        [
            (0, "x", True, False, "chosen"),
            (0, "y", True, False, "chosen"),
            (1, "x", True, False, "chosen"),
            (1, "y", False, False, "equal"),
        ],
        PAIRS,
    )
    report = people.compare({}, {}, people.review_pairs(PAIRS))
    assert report.readers_alpha.value == pytest.approx(1 - 0.25 / (2 / 7 * 1.875))


def test_a_calibration_is_fitted_on_verdicts() -> None:
    """30 pairs: people call chosen answers right and rejected ones wrong, except in every fifth pair the other way."""
    pairs = [pair_of(number, chosen=0.6 + number / 100, gap=0.3) for number in range(30)]
    people = judge([(n, "x", n % 5 > 0, n % 5 == 0, "equal") for n in range(30)], pairs)
    (fitted,) = people.fit_calibrations({"judge-digest": scores_of(pairs)}, "platt")
    assert (fitted.judge, fitted.method) == ("judge-digest", "platt")
    assert fitted.before is not None
    assert fitted.before.n == 60
    assert fitted.before.auc == pytest.approx(0.8, abs=0.05)
    assert fitted.calibrate_score(0.9) > 0.5 > fitted.calibrate_score(0.3)
    few = judge([(n, "x", True, False, "chosen") for n in range(5)], PAIRS)
    with pytest.raises(CalibrationRefused):
        few.fit_calibrations({"judge-digest": scores_of(PAIRS)}, "platt")


def test_verdicts_of_another_export_are_refused() -> None:
    stranger = ReaderVerdict(task="review-99", reader="x", a_right=True, b_right=True, better="a")
    with pytest.raises(InvalidInput, match="1 tasks are not in the key, for instance review-99"):
        PeopleJudge([ITEM], [stranger], "")
    with pytest.raises(InvalidInput, match="no task of the export has been annotated"):
        PeopleJudge([ITEM], [], "")
