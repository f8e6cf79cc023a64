"""What a model is shown and asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.geometry import WHOLE, box_of
from clincot.jsonl import BadRecord
from clincot.prompts import (
    VIEWS_FILE,
    WORDINGS,
    Picture,
    Step,
    Turn,
    Views,
    answered,
    chain,
    crop_picture,
    finding_in,
    judgement,
    load_views,
    look,
    look_closer,
    pictures_of,
    prompt_digest,
    rated,
    save_views,
    whole_pictures,
)
from clincot.records import Study

STUDY = Study(image="images/a.png", sha256="0" * 64, width=200, height=100)
FOLDER = Path("data")
BRIEF = Views(wording="brief", whole_grid=2, whole_px=64, crop_px=32)
BOX = box_of((0.1, 0.2, 0.3, 0.4))


def test_the_whole_image_is_one_picture_as_it_is_or_a_grid_in_reading_order() -> None:
    assert whole_pictures(STUDY, FOLDER, Views()) == (Picture("data/images/a.png", "0" * 64, None, None),)
    grid = whole_pictures(STUDY, FOLDER, BRIEF)
    assert [p.box.xyxy for p in grid if p.box] == [
        (0.0, 0.0, 0.5, 0.5),
        (0.5, 0.0, 1.0, 0.5),
        (0.0, 0.5, 0.5, 1.0),
        (0.5, 0.5, 1.0, 1.0),
    ]
    assert {p.side_px for p in grid} == {64}


def test_a_crop_is_square_in_pixels_and_never_below_the_least_side() -> None:
    """The box is 40 x 20 px of a 200 x 100 px film. min_crop .25 of the shorter side is 25 px, so the side is 40 px:
    .2 of the width and .4 of the height, around the centre (.2, .3)."""
    assert crop_picture(STUDY, FOLDER, BRIEF, BOX).box == box_of((0.1, 0.1, 0.3, 0.5))
    small = crop_picture(STUDY, FOLDER, BRIEF, box_of((0.5, 0.5, 0.51, 0.52)))
    assert small.box is not None
    width_px, height_px = (small.box.x1 - small.box.x0) * 200, (small.box.y1 - small.box.y0) * 100
    assert (width_px, height_px) == pytest.approx((25, 25))
    assert crop_picture(STUDY, FOLDER, BRIEF, WHOLE).box == WHOLE


def test_a_look_closer_goes_on_from_the_look() -> None:
    opening = look(STUDY, FOLDER, BRIEF, "Is there a nodule?")
    closer = look_closer(opening, STUDY, FOLDER, BRIEF, question="Is there a nodule?", box=BOX, written=True)
    assert closer[: len(opening)] == opening
    assert [(t.role, t.text, len(t.pictures), t.action) for t in closer] == [
        ("user", "Is there a nodule?", 4, False),
        ("assistant", "[10, 20, 30, 40]", 0, True),
        ("user", "", 1, False),
    ]


def test_the_full_wording_says_the_question_in_both_turns() -> None:
    first, _, second = chain(STUDY, FOLDER, Views(), [Step("Which {zone}? 100 %", BOX, written=False)])
    assert first.text.startswith("Which {zone}? 100 %\n")  # braces of a question are text
    assert second.text.endswith("Which {zone}? 100 %")


def test_only_the_last_step_of_a_chain_is_action() -> None:
    steps = [Step("What is seen?", BOX, True, "a nodule"), Step("Is it smooth?", WHOLE, True, "yes")]
    turns = chain(STUDY, FOLDER, BRIEF, steps)
    assert [(t.role, t.text, t.action) for t in turns] == [
        ("user", "What is seen?", False),
        ("assistant", "[10, 20, 30, 40]", False),
        ("user", "", False),
        ("assistant", "a nodule", False),
        ("user", "Is it smooth?", False),
        ("assistant", "[0, 0, 100, 100]", True),
        ("user", "", False),
        ("assistant", "yes", True),
    ]
    assert len(pictures_of(turns)) == 4 + 1 + 1  # the whole image once
    given = chain(STUDY, FOLDER, BRIEF, [*steps[:1], Step("Is it smooth?", WHOLE, False, "yes")])
    assert [t.action for t in given] == [False] * 7 + [True]  # a tool's region is input


def test_a_judge_sees_image_crop_question_and_answer_and_nothing_else() -> None:
    (turn,) = judgement(STUDY, FOLDER, BRIEF, question="Which side?", answer="left", box=BOX)
    assert turn.text == "[10, 20, 30, 40] Which side? left?"
    assert turn.pictures == (*whole_pictures(STUDY, FOLDER, BRIEF), crop_picture(STUDY, FOLDER, BRIEF, BOX))
    assert not turn.action


def test_a_finding_is_asked_of_the_crop_alone() -> None:
    (turn,) = finding_in(STUDY, FOLDER, BRIEF, finding="a nodule", box=BOX)
    assert turn.text == "Is there a nodule?"
    assert turn.pictures == (crop_picture(STUDY, FOLDER, BRIEF, BOX),)


def test_a_rating_is_asked_in_the_last_turn_and_an_answer_ends_a_conversation() -> None:
    asked = judgement(STUDY, FOLDER, BRIEF, question="Which side?", answer="left", box=BOX)
    (turn,) = rated(asked)
    assert turn.text.startswith("[10, 20, 30, 40] Which side? left?\n")
    assert "n/10" in turn.text
    assert turn.pictures == asked[0].pictures
    assert answered(asked, "yes") == (*asked, Turn("assistant", "yes", action=True))


def test_views_come_back_from_the_checkpoint_and_default_without_a_file(tmp_path: Path) -> None:
    assert load_views(tmp_path) == Views()
    save_views(tmp_path, BRIEF)
    assert load_views(tmp_path) == BRIEF


@pytest.mark.parametrize(
    ("text", "says"), [('{"crop_pixels": 3}', "crop_pixels"), ('{"min_crop": 0}', "min_crop"), ("{", "not JSON")]
)
def test_a_wrong_views_file_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / VIEWS_FILE).write_text(text)
    with pytest.raises(BadRecord) as refused:
        load_views(tmp_path)
    assert str(tmp_path / VIEWS_FILE) in str(refused.value)
    assert says in str(refused.value)


def test_the_prompt_digest_tells_wordings_and_sizes_apart() -> None:
    views = [Views(), BRIEF, Views(crop_px=64), Views(min_crop=0.5)]
    assert len({prompt_digest(v) for v in views}) == len(views)
    assert prompt_digest(Views()) == prompt_digest(Views())
    assert WORDINGS["full"].digest != WORDINGS["brief"].digest


def test_a_picture_is_known_by_content_box_and_size_and_not_by_its_path() -> None:
    key = Picture("a.png", "1" * 64, BOX, 64).key
    assert Picture("b.png", "1" * 64, BOX, 64).key == key
    others = [
        Picture("a.png", "2" * 64, BOX, 64),
        Picture("a.png", "1" * 64, None, 64),
        Picture("a.png", "1" * 64, BOX),
    ]
    assert key not in {p.key for p in others}
