"""The visual chain of thought: the regions it looks at, and how answers from several regions become one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from clincot.config.server_settings import ServeSettings
from clincot.datasets.folder import StudyIndex
from clincot.generation.visual_cot import (
    ImageQuestion,
    ProposedRegion,
    RegionAnswer,
    RegionsProposed,
    VisualAnswer,
    answer_question,
    combine_region_answers,
    measure_leads,
)
from clincot.geometry import WHOLE_IMAGE, box_from_xyxy
from clincot.models.vlm import VisionLanguageModel
from tests.serving.conftest import POLICY
from tests.support.model_servers import Parrot

HERE = box_from_xyxy((0.1, 0.1, 0.5, 0.5))


def seen(answer: str, likelihood: float, *, cut_off: bool = False) -> RegionAnswer:
    return RegionAnswer(
        hypothesis="nodule",
        grounder="windows",
        box=HERE,
        grounder_confidence=0.5,
        answer=answer,
        likelihood=likelihood,
        cut_off=cut_off,
    )


PROPOSED = ProposedRegion(hypothesis="nodule", grounder="windows", box=HERE, grounder_confidence=0.5)
PROPOSED_JSON = '{"hypothesis":"nodule","grounder":"windows","box":{"x0":0.1,"y0":0.1,"x1":0.5,"y1":0.5},"found":0.5}'


def test_grounder_confidence_is_found_on_the_wire() -> None:
    """Clients read `found`: in a region, in what contains it, in Python form and in the schema."""
    assert PROPOSED.model_dump_json() == PROPOSED_JSON
    proposed = RegionsProposed(hypotheses=("nodule",), regions=(PROPOSED,))
    assert proposed.model_dump_json() == f'{{"hypotheses":["nodule"],"regions":[{PROPOSED_JSON}]}}'
    assert proposed.model_dump(mode="json") == json.loads(proposed.model_dump_json())
    answer = answered(seen("yes", 0.75)).model_dump_json()
    assert f'"regions":[{PROPOSED_JSON[:-1]},"answer":"yes","likelihood":0.75}}]' in answer
    for mode in ("validation", "serialization"):
        assert list(ProposedRegion.model_json_schema(mode=mode)["properties"])[-1] == "found"


def test_a_reply_is_read_back_from_the_wire() -> None:
    assert ProposedRegion.model_validate_json(PROPOSED_JSON) == PROPOSED
    answer = answered(seen("yes", 0.75))
    assert VisualAnswer.model_validate_json(answer.model_dump_json()) == answer


def test_confidence_is_mean_likelihood_of_agreeing_regions() -> None:
    """yes: (0.9 + 0.6) / 3 = 0.5; no: 0.8 / 3 = 0.267. Two of three regions agree, and region 0 says it best."""
    answer, winner, confidence, agreement = combine_region_answers(
        [seen("yes", 0.9), seen("no", 0.8), seen("Yes.", 0.6)]
    )
    assert (answer, winner, confidence) == ("yes", 0, 0.5)
    assert agreement == pytest.approx(2 / 3, abs=1e-6)


def test_one_sure_region_outweighs_two_that_doubt() -> None:
    """no: 0.9 / 3 = 0.3; yes: (0.2 + 0.3) / 3 = 0.167: a plain vote would have said yes."""
    assert combine_region_answers([seen("yes", 0.2), seen("no", 0.9), seen("yes", 0.3)])[0] == "no"


def test_answers_that_tie_go_to_the_region_seen_first() -> None:
    assert combine_region_answers([seen("left", 0.5), seen("right", 0.5)])[:2] == ("left", 0)


def test_confidence_never_exceeds_the_mixture_it_stands_for() -> None:
    """All regions sure and of one mind: 1, the most there is."""
    assert combine_region_answers([seen("yes", 1.0)] * 3)[2] == 1.0


def test_nothing_seen_is_refused() -> None:
    with pytest.raises(ValueError, match="no region"):
        combine_region_answers([])


def test_a_cut_off_answer_adds_no_confidence() -> None:
    """Two likely cut-off answers lose to one that ended: 0.4 / 4, and one of four regions agrees."""
    regions = [seen("[[[[", 0.99, cut_off=True), seen("no", 0.99, cut_off=True), seen("yes", 0.1), seen("no", 0.4)]
    assert combine_region_answers(regions) == ("no", 3, 0.1, 0.25)
    assert measure_leads(answered(*regions)) == pytest.approx((0.075, 0.4))


def test_an_empty_answer_abstains(films: Path) -> None:
    """It is off format in evaluation too, so nothing speaks for it, however likely its end token was."""

    class Silent(Parrot):
        def generate(self, conversations, **options):  # type: ignore[no-untyped-def]
            return [replace(reply, text="") for reply in super().generate(conversations, **options)]

    parrot = Silent()
    parrot.go.set()
    study = next(iter(StudyIndex(films).values()))
    settings = ServeSettings.model_validate({"propose": {"grounders": {"random": 1}}})
    answer = answer_question(ImageQuestion(study, films, "Is there a nodule?"), parrot, settings)
    assert (answer.answer, answer.abstained, answer.confidence, answer.cut_off) == ("", True, 0.0, False)
    assert answer.abstain_reason == "off_format"


def test_without_a_complete_answer_the_confidence_is_zero() -> None:
    assert combine_region_answers([seen("it is a", 0.9, cut_off=True)] * 2) == ("it is a", 0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("cut", "abstained", "confidence"), [({0, 1}, True, 0.0), ({0}, False, 0.236183), ((), False, 0.472367)]
)
def test_an_answer_without_an_end_abstains(films: Path, cut: set[int], abstained: bool, confidence: float) -> None:
    """Generation.cut_off reaches the region's answer and, if all are cut off, the reply."""

    class Cutting(Parrot):
        def generate(self, conversations, **options):  # type: ignore[no-untyped-def]
            replies = super().generate(conversations, **options)
            return [replace(reply, cut_off=i in cut) for i, reply in enumerate(replies)]

    parrot = Cutting()
    parrot.go.set()
    study = next(iter(StudyIndex(films).values()))
    settings = ServeSettings.model_validate({"propose": {"grounders": {"random": 1}}})
    answer = answer_question(ImageQuestion(study, films, "Is there a nodule?"), parrot, settings)
    assert [region.cut_off for region in answer.regions] == [0 in cut, 1 in cut]
    assert (answer.abstained, answer.cut_off, answer.confidence) == (abstained, abstained, confidence)
    assert answer.model_dump_json().count('"cut_off":') == len(cut)  # replies without cut-off answers keep their bytes


def answered(*regions: RegionAnswer) -> VisualAnswer:
    answer, winner, confidence, agreement = combine_region_answers(regions)
    return VisualAnswer(
        answer=answer,
        confidence=confidence,
        agreement=agreement,
        abstained=False,
        hypotheses=(),
        regions=regions,
        winner=winner,
        policy="p",
        prompt="p",
    )


def test_how_far_an_answer_and_its_place_are_from_another() -> None:
    """yes: (0.9 + 0.8) / 3, no: 0.5 / 3, so 1.2 / 3 = 0.4 ahead; of the two that say yes the first leads by 0.1.

    Alone of its mind, a region leads by all of its likelihood; two that are equally sure lead by nothing.
    """
    assert measure_leads(answered(seen("yes", 0.9), seen("no", 0.5), seen("Yes.", 0.8))) == pytest.approx((0.4, 0.1))
    assert measure_leads(answered(seen("yes", 0.9), seen("no", 0.3))) == pytest.approx((0.3, 0.9))
    assert measure_leads(answered(seen("yes", 1.0), seen("yes", 1.0))) == (1.0, 0.0)


def test_the_whole_image_is_always_looked_at(films: Path) -> None:
    """The parrot writes no region; two windows (of side 0.5) and the whole image are left. Likelihood e^-0.75."""
    parrot = Parrot()
    parrot.go.set()
    study = next(iter(StudyIndex(films).values()))
    settings = ServeSettings.model_validate(
        {"propose": {"grounders": {"windows": 2, "written": 1}, "window_sides": [0.5], "merge_iou": 1.0}}
    )
    answer = answer_question(ImageQuestion(study, films, "Is there a nodule?"), parrot, settings)
    assert [region.grounder for region in answer.regions] == ["windows", "windows", "whole"]
    assert answer.regions[-1].box == WHOLE_IMAGE
    assert {region.likelihood for region in answer.regions} == {0.472367}  # exp(-0.75)
    assert answer.confidence == pytest.approx(0.472367)
    assert answer.hypotheses == ("nodule", "normal")


def test_low_confidence_abstains_and_keeps_the_chain(films: Path) -> None:
    """Below `abstain_below` the answer abstains but still contains its regions."""
    parrot = Parrot()
    parrot.go.set()
    study = next(iter(StudyIndex(films).values()))
    asked = ImageQuestion(study, films, "Is there a nodule?")
    given = {
        limit: answer_question(
            asked,
            parrot,
            ServeSettings.model_validate({"abstain_below": limit, "propose": {"grounders": {"random": 1}}}),
        )
        for limit in (0.47, 0.48)  # exp(-0.75) = 0.4724
    }
    assert not given[0.47].abstained
    assert given[0.48].abstained
    assert given[0.48].regions == given[0.47].regions


def test_the_second_turn_extends_the_first(films: Path) -> None:
    """What a prefix cache needs: every answer's conversation begins with the very turn that asked for a region."""
    said: list[tuple[object, ...]] = []

    class Listening(Parrot):
        def generate(self, conversations, **options):  # type: ignore[no-untyped-def]
            said.extend(conversations)
            return super().generate(conversations, **options)

    parrot = Listening()
    parrot.go.set()
    study = next(iter(StudyIndex(films).values()))
    settings = ServeSettings.model_validate({"propose": {"grounders": {"random": 1, "written": 1}}})
    answer_question(ImageQuestion(study, films, "Is there a nodule?"), parrot, settings)
    opening, *answers = said
    assert len(answers) == 2
    assert all(conversation[: len(opening)] == opening for conversation in answers)


def test_the_shipped_policy_answers_the_same_twice(films: Path) -> None:
    model = VisionLanguageModel(POLICY)
    study = next(iter(StudyIndex(films).values()))
    asked = ImageQuestion(study, films, "Is there a nodule?")
    first, second = (answer_question(asked, model, ServeSettings()) for _ in range(2))
    assert first == second
    assert first.policy == model.digest


@pytest.mark.parametrize("question", ["What is the finding?", "Is there a nodule?"])
def test_the_modality_of_a_data_set_does_not_change_what_is_served(films: Path, question: str) -> None:
    """A server is sent an image and nothing about it; with a modality other findings would be looked for."""
    study = next(iter(StudyIndex(films).values()))
    policy = Parrot()
    policy.go.set()
    plain, known = (
        answer_question(
            ImageQuestion(study.model_copy(update={"modality": modality}), films, question), policy, ServeSettings()
        )
        for modality in ("", "brain MRI")
    )
    assert known == plain
