"""Arms of the evaluation: where each looks, which of them know the key, and what counts as off format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clincot.config import EvaluateConfig, ProposeConfig, ServeConfig
from clincot.datasets.folder import StudyIndex
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.evaluator import collect_answer_spaces, evaluate_policy
from clincot.evaluation.read_benchmark import read_benchmark
from clincot.generation.visual_cot import ImageQuestion, answer_question, measure_leads
from clincot.geometry import WHOLE_IMAGE, box_from_pixels, compute_coverage, fit_view_square
from clincot.images import encode_mask, measure_mask
from clincot.jsonl import write_records
from clincot.models.encoding import read_picture
from clincot.models.protocols import Generation
from clincot.prompts import Conversation
from clincot.records import Outcome, Question, Reference
from tests.support import tiny
from tests.support.bright import BrightPolicy

ARMS = ("written", "windows", "relevance", "random", "wrong", "oracle", "shuffled", "whole")
PROPOSE = ProposeConfig(window_sides=(0.25,), window_stride=0.5)


class Reader(BrightPolicy):
    """Writes `region` where it is asked for one, and `answers[topic]` else; P(yes) is brightness."""

    def __init__(
        self, region: str = "[10, 10, 35, 35]", *, closed: str = "yes", zone: str = "upper", cut: bool = False
    ):
        super().__init__()
        self.region, self.closed, self.zone, self.cut = region, closed, zone, cut

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        assert temperature == 0
        self.asked += conversations
        replies = []
        for conversation in conversations:
            text = self.region
            if len(conversation) > 1:
                text = self.zone if "zone" in conversation[0].text else self.closed
            replies.append(Generation(text, (-0.1,) * max_new_tokens, cut_off=self.cut))
        return replies


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 films of 4 patients, two films of a patient standing together as in a rendered benchmark."""
    made = tiny.write_set(tmp_path_factory.mktemp("bench") / "data", studies=8, seed=3)
    lines = (made / "studies.jsonl").read_text().splitlines()
    patients = {}
    studies, ids = [], {}
    for number, line in enumerate(lines):
        row = json.loads(line)
        before = row.pop("id")
        row["patient"] = f"p{number // 2}"
        studies.append(type(next(iter(StudyIndex(made).values()))).model_validate(row))
        ids[before] = studies[-1].id
        patients[studies[-1].id] = row["patient"]
    questions, references = [], []
    for line, other in zip(
        (made / "questions.jsonl").read_text().splitlines(),
        (made / "references.jsonl").read_text().splitlines(),
        strict=True,
    ):
        question, reference = json.loads(line), json.loads(other)
        question["study"] = ids[question["study"]]
        questions.append(Question.model_validate({k: v for k, v in question.items() if k != "id"}))
        reference["question"] = questions[-1].id
        references.append(Reference.model_validate({k: v for k, v in reference.items() if k != "id"}))
    for name, records in (("studies", studies), ("questions", questions), ("references", references)):
        write_records(made / f"{name}.jsonl", records)
    return made


@pytest.fixture(scope="module")
def benchmark(folder: Path) -> Benchmark:
    return read_benchmark(folder)


def outcomes(policy: BrightPolicy, benchmark: Benchmark, folder: Path, *arms: str, limit: int = 0) -> list[Outcome]:
    config = EvaluateConfig.model_validate({"arms": arms, "propose": PROPOSE, "limit": limit, "max_new_tokens": 4})
    return list(evaluate_policy(policy, benchmark, StudyIndex(folder), folder, config))


def test_every_arm_answers_every_question_in_order(benchmark: Benchmark, folder: Path) -> None:
    made = outcomes(Reader(), benchmark, folder, *ARMS)
    assert [(o.arm, o.question) for o in made] == [(arm, q) for arm in ARMS for q in benchmark.questions]
    assert len({o.id for o in made}) == len(made)
    limited = outcomes(Reader(), benchmark, folder, "whole", limit=3)
    assert [o.question for o in limited] == list(benchmark.questions)[:3]


def test_oracle_uses_the_keys_box_and_whole_the_image(benchmark: Benchmark, folder: Path) -> None:
    for o in outcomes(Reader(), benchmark, folder, "oracle"):
        assert o.box == fit_view_square(benchmark.references[o.question].boxes[0])
        assert o.hit is True
        assert o.iou == 1.0  # the square that looks at the box is what is shown
    assert {o.box for o in outcomes(Reader(), benchmark, folder, "whole")} == {WHOLE_IMAGE}


def test_wrong_misses_the_finding_at_the_oracles_size(benchmark: Benchmark, folder: Path) -> None:
    """The region of `wrong` never covers the finding and has the size of the oracle's."""
    for o in outcomes(Reader(), benchmark, folder, "wrong"):
        (box,) = benchmark.references[o.question].boxes
        assert compute_coverage(box, by=o.box) == 0
        assert o.hit is False
        assert o.box.x1 - o.box.x0 == pytest.approx(fit_view_square(box).x1 - fit_view_square(box).x0, abs=2e-4)


def test_random_is_as_large_and_anywhere(benchmark: Benchmark, folder: Path) -> None:
    made = outcomes(Reader(), benchmark, folder, "random")
    assert len({o.box for o in made}) == len(made)
    assert all(o.box.x1 - o.box.x0 == pytest.approx(0.25, abs=2e-4) for o in made)
    assert outcomes(Reader(), benchmark, folder, "random") == made


def test_shuffled_shows_another_patient_at_the_oracles_box(benchmark: Benchmark, folder: Path) -> None:
    """The bug: the next image was shown, which may be the same patient's."""
    policy = Reader()
    made = outcomes(policy, benchmark, folder, "shuffled")
    patients = {str(folder / study.image): study.patient for study in StudyIndex(folder).values()}
    assert len(set(patients.values())) == 4
    shown = [conversation[0].pictures[0].path for conversation in policy.asked]
    for o, path in zip(made, shown, strict=True):
        assert patients[path] != benchmark.clusters[o.question]
        assert o.box == fit_view_square(benchmark.references[o.question].boxes[0])
    with pytest.raises(ValueError, match=r"'shuffled' needs images of two patients, all are of 'p0'"):
        outcomes(Reader(), benchmark, folder, "shuffled", limit=4)


def test_only_the_controls_know_the_key(benchmark: Benchmark, folder: Path) -> None:
    """The same questions with another key: every box somewhere else, every answer another."""
    moved = {
        name: Reference(question=name, answer="other", boxes=(fit_view_square(WHOLE_IMAGE),), finding=reference.finding)
        for name, reference in benchmark.references.items()
    }
    other = Benchmark(benchmark.questions, moved, benchmark.clusters, benchmark.digest)
    blind = ("written", "windows", "relevance", "whole")
    one, two = outcomes(Reader(), benchmark, folder, *ARMS), outcomes(Reader(), other, folder, *ARMS)
    for a, b in zip(one, two, strict=True):
        assert a.answer == b.answer
        if a.arm in blind:
            assert a.box == b.box
        elif a.arm in ("oracle", "shuffled"):
            assert a.box != b.box
    assert not any(o.correct for o in two)


def test_windows_and_relevance_find_the_bright_square(benchmark: Benchmark, folder: Path) -> None:
    """Squares of 24 px of 128; windows of 32 px every 16 px or less: one of them shows more than half of it."""
    made = outcomes(Reader(), benchmark, folder, "windows", "relevance")
    assert all(o.hit for o in made)


def test_a_written_region_is_read_and_none_is_a_miss(benchmark: Benchmark, folder: Path) -> None:
    for o in outcomes(Reader("[10, 20, 35, 45]"), benchmark, folder, "written"):
        assert o.box.xyxy == (0.1, 0.2, 0.35, 0.45)
        assert not o.off_format
    for o in outcomes(Reader("somewhere"), benchmark, folder, "written"):
        assert o.box == WHOLE_IMAGE  # what is shown instead; it counts as no place
        assert (o.off_format, o.hit, o.iou) == (True, False, 0.0)


def test_a_written_region_is_asked_for_once_and_then_the_answer(benchmark: Benchmark, folder: Path) -> None:
    policy = Reader()
    outcomes(policy, benchmark, folder, "written", limit=2)
    assert [len(conversation) for conversation in policy.asked] == [1, 1, 3, 3]
    assert [turn.action for turn in policy.asked[-1]] == [False, True, False]


def test_correct_is_the_strict_comparison(benchmark: Benchmark, folder: Path) -> None:
    """Every presence question is answered yes; the zone is upper for some."""
    upper = {name for name, r in benchmark.references.items() if r.answer == "upper"}
    assert 0 < len(upper) < 8
    for o in outcomes(Reader(closed="Yes.", zone="upper"), benchmark, folder, "whole"):
        assert o.correct is (benchmark.questions[o.question].kind == "closed" or o.question in upper)
        assert not o.off_format
        assert o.reference == benchmark.references[o.question].id


@pytest.mark.parametrize(
    ("policy", "off"),
    [
        (Reader(), {"presence": False, "zone": False}),
        (Reader(closed="maybe", zone="lower"), {"presence": True, "zone": False}),
        (Reader(closed="yes it is"), {"presence": True, "zone": False}),
        (Reader(zone="middle"), {"presence": False, "zone": True}),
        (Reader(zone=""), {"presence": False, "zone": True}),
        (Reader(cut=True), {"presence": True, "zone": True}),
    ],
)
def test_other_answers_and_cut_off_ones_are_off_format(
    policy: Reader, off: dict[str, bool], benchmark: Benchmark, folder: Path
) -> None:
    """A reply of exactly max_new_tokens with its end of turn is whole; it was taken for cut off."""
    made = outcomes(policy, benchmark, folder, "whole")
    assert {benchmark.questions[o.question].topic: o.off_format for o in made} == off


def test_topics_with_many_answers_have_no_answer_space() -> None:
    """Neither have questions without a topic."""

    def bench(topic: str, answers: list[str], kind: str = "open") -> Benchmark:
        questions = [
            Question.model_validate({"study": "s", "text": f"{n}?", "kind": kind, "topic": topic})
            for n in range(len(answers))
        ]
        references = {q.id: Reference(question=q.id, answer=a) for q, a in zip(questions, answers, strict=True)}
        return Benchmark({q.id: q for q in questions}, references, {q.id: "p" for q in questions}, "d")

    def by_topic(topic: str, answers: list[str]) -> dict[str, frozenset[str]]:
        return dict(collect_answer_spaces(bench(topic, answers)).by_topic)

    assert by_topic("size", [f"answer {n}" for n in range(20)]).keys() == {"size"}
    assert by_topic("size", [f"answer {n}" for n in range(21)]) == {}
    assert by_topic("", ["yes"]) == {}
    assert by_topic("side", ["Left.", "left", "right"]) == {"side": frozenset({"left", "right"})}


def test_controls_of_an_absent_finding_have_its_usual_size(benchmark: Benchmark, folder: Path) -> None:
    """No box in the key: oracle and wrong look anywhere, at the square that the finding has elsewhere (.25)."""
    first = next(iter(benchmark.references))
    absent = Reference(question=first, answer="no", finding="nodule")
    other = Benchmark(benchmark.questions, {**benchmark.references, first: absent}, benchmark.clusters, "d")
    made = outcomes(Reader(), other, folder, "oracle", "wrong", "shuffled", "written", limit=6)
    for o in (o for o in made if o.question == first):
        assert (o.hit, o.iou) == (None, None)
        assert o.box.x1 - o.box.x0 == pytest.approx(0.25, abs=2e-4)


def test_the_oracle_fits_an_organ_of_a_film_that_is_not_square(tmp_path: Path) -> None:
    """A film of 160 x 80. The lung is 72 x 64 px: the square of 72 px around its centre (76, 40), IoU 1 with itself.

    `wrong` and `random` have the same 72 px, .9 of the film's height and .45 of its width.
    """
    made = tiny.write_set(tmp_path / "data", studies=2, shapes=((160, 80),))
    lung = box_from_pixels(40, 8, 112, 72, width=160, height=80)
    key = {
        name: Reference(question=name, answer=reference.answer, boxes=(lung,), finding="lung")
        for name, reference in read_benchmark(made).references.items()
    }
    plain = read_benchmark(made)
    organs = Benchmark(plain.questions, key, plain.clusters, "d")
    square = box_from_pixels(40, 4, 112, 76, width=160, height=80)
    for o in outcomes(Reader(), organs, made, "oracle"):
        assert o.box == square
        assert (o.hit, o.iou) == (True, 1.0)
    for o in outcomes(Reader(), organs, made, "random", "wrong"):
        width, height = o.box.x1 - o.box.x0, o.box.y1 - o.box.y0
        assert (width, height) == (pytest.approx(0.45, abs=2e-4), pytest.approx(0.9, abs=2e-4))


def test_the_oracle_cuts_out_the_keys_mask(tmp_path: Path) -> None:
    """With mask_outside: blank, the oracle shows the pixels of the mask only, and other arms show whole squares."""
    made = tiny.write_set(tmp_path / "data", studies=1)
    plain = read_benchmark(made)
    mask_HW = np.zeros((tiny.SIDE, tiny.SIDE), dtype=bool)
    mask_HW[20:50, 30:60] = True
    mask = encode_mask(mask_HW)
    key = {
        name: Reference(question=name, answer="yes", boxes=(measure_mask(mask),), masks=(mask,))
        for name in plain.references
    }
    config = EvaluateConfig.model_validate(
        {"arms": ["oracle", "random"], "propose": PROPOSE.model_dump() | {"mask_outside": "blank"}, "max_new_tokens": 4}
    )
    policy = Reader()
    benchmark = Benchmark(plain.questions, key, plain.clusters, "d")
    list(evaluate_policy(policy, benchmark, StudyIndex(made), made, config))
    crops = [conversation[-1].pictures[-1] for conversation in policy.asked]
    assert [crop.cutout is not None for crop in crops] == [True, True, False, False]
    film_HW = np.asarray(Image.open(crops[0].path).convert("L"))
    shown_HW = np.asarray(read_picture(crops[0]).convert("L"))
    assert (shown_HW > 0).sum() == (film_HW[20:50, 30:60] > 0).sum() == 900


def test_served_is_what_the_server_answers(folder: Path) -> None:
    """The arm `served` and a server with the same settings give one answer, from one region, with one digest.

    The answers leave through generation.visual_cot in both; here the arm answers all questions in one batch and the
    server one by one.
    """
    grounders = {"windows": 1, "written": 1}
    serve = ServeConfig(propose=ProposeConfig.model_validate({"grounders": grounders, "temperature": 0.0}))
    config = EvaluateConfig(arms=("served",), serve=serve)
    benchmark, studies = read_benchmark(folder), StudyIndex(folder)
    outcomes = list(evaluate_policy(Reader(), benchmark, studies, folder, config))
    assert [outcome.question for outcome in outcomes] == list(benchmark.questions)
    for outcome in outcomes:
        question = benchmark.questions[outcome.question]
        asked = ImageQuestion(studies[question.study], folder, question.text)
        answer = answer_question(asked, Reader(), serve)
        assert (outcome.answer, outcome.box, outcome.settings) == (answer.answer, answer.box, answer.settings)
        assert outcome.settings == serve.answer_digest
        lead, region_lead = measure_leads(answer)
        assert (outcome.lead, outcome.region_lead) == (round(lead, 6), round(region_lead, 6))


def _shows_a_crop(conversation: Conversation) -> bool:
    boxes = [picture.box for turn in conversation for picture in turn.pictures]
    return any(box is not None and box.area < 0.9 for box in boxes[1:])


class Overlooking(Reader):
    """Sure of its answers from the whole image alone."""

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        replies = super().generate(conversations, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)
        return [
            reply if _shows_a_crop(conversation) else replace(reply, token_logprobs=(-0.001,))
            for conversation, reply in zip(conversations, replies, strict=True)
        ]


def test_an_answer_from_the_whole_image_points_nowhere(folder: Path) -> None:
    """The whole image contains every finding, but nobody is shown where to look: a miss, with IoU 0."""
    propose = ProposeConfig.model_validate({"grounders": {"windows": 1}, "temperature": 0.0})
    config = EvaluateConfig(arms=("served",), serve=ServeConfig(propose=propose))
    benchmark = read_benchmark(folder)
    outcomes = list(evaluate_policy(Overlooking(), benchmark, StudyIndex(folder), folder, config))
    with_boxes = [outcome for outcome in outcomes if benchmark.references[outcome.question].boxes]
    assert with_boxes
    assert {(outcome.box, outcome.hit, outcome.iou) for outcome in with_boxes} == {(WHOLE_IMAGE, False, 0.0)}


def test_other_arms_are_recorded_as_before(folder: Path) -> None:
    """Settings of a server and leads belong to the arm `served`; elsewhere they are absent, so ids stay the same."""
    config = EvaluateConfig(arms=("whole",), propose=PROPOSE)
    (outcome, *_) = evaluate_policy(Reader(), read_benchmark(folder), StudyIndex(folder), folder, config)
    assert not {"settings", "lead", "region_lead"} & set(outcome.model_dump(mode="json"))
