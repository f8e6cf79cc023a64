"""The images and texts that policies and judges receive."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.geometry import WHOLE_IMAGE, box_from_xyxy
from clincot.jsonl import InvalidRecord
from clincot.prompts import (
    PROMPT_FORMAT_FILE,
    PROMPT_TEMPLATES,
    ChainStep,
    ImageView,
    PromptFormat,
    Turn,
    answer_prompt,
    build_crop_view,
    build_whole_views,
    chain_prompt,
    collect_views,
    finding_prompt,
    hash_prompt,
    judge_prompt,
    load_prompt_format,
    rating_prompt,
    region_prompt,
    save_prompt_format,
    with_answer,
)
from clincot.records import Study

STUDY = Study(image="images/a.png", sha256="0" * 64, width=200, height=100)
FOLDER = Path("data")
BRIEF = PromptFormat(wording="brief", whole_grid=2, whole_px=64, crop_px=32)
BOX = box_from_xyxy((0.1, 0.2, 0.3, 0.4))


def test_the_whole_image_is_one_view_or_a_grid_in_reading_order() -> None:
    assert build_whole_views(STUDY, FOLDER, PromptFormat()) == (ImageView("data/images/a.png", "0" * 64, None, None),)
    grid = build_whole_views(STUDY, FOLDER, BRIEF)
    assert [p.box.xyxy for p in grid if p.box] == [
        (0.0, 0.0, 0.5, 0.5),
        (0.5, 0.0, 1.0, 0.5),
        (0.0, 0.5, 0.5, 1.0),
        (0.5, 0.5, 1.0, 1.0),
    ]
    assert {p.side_px for p in grid} == {64}


def test_a_crop_is_square_in_pixels_and_has_a_smallest_side() -> None:
    """The box is 40 x 20 px of a 200 x 100 px film. min_crop .25 of the shorter side is 25 px, so the side is 40 px:
    .2 of the width and .4 of the height, around the centre (.2, .3)."""
    assert build_crop_view(STUDY, FOLDER, BRIEF, BOX).box == box_from_xyxy((0.1, 0.1, 0.3, 0.5))
    small = build_crop_view(STUDY, FOLDER, BRIEF, box_from_xyxy((0.5, 0.5, 0.51, 0.52)))
    assert small.box is not None
    width_px, height_px = (small.box.x1 - small.box.x0) * 200, (small.box.y1 - small.box.y0) * 100
    assert (width_px, height_px) == pytest.approx((25, 25))
    assert build_crop_view(STUDY, FOLDER, BRIEF, WHOLE_IMAGE).box == WHOLE_IMAGE


def test_the_answer_prompt_continues_the_region_prompt() -> None:
    opening = region_prompt(STUDY, FOLDER, BRIEF, "Is there a nodule?")
    closer = answer_prompt(opening, STUDY, FOLDER, BRIEF, ChainStep("Is there a nodule?", BOX, written=True))
    assert closer[: len(opening)] == opening
    assert [(t.role, t.text, len(t.pictures), t.action) for t in closer] == [
        ("user", "Is there a nodule?", 4, False),
        ("assistant", "[10, 20, 30, 40]", 0, True),
        ("user", "", 1, False),
    ]


def test_the_full_wording_repeats_the_question() -> None:
    first, _, second = chain_prompt(
        STUDY, FOLDER, PromptFormat(), [ChainStep("Which {zone}? 100 %", BOX, written=False)]
    )
    assert first.text.startswith("Which {zone}? 100 %\n")  # braces of a question are text
    assert second.text.endswith("Which {zone}? 100 %")


def test_only_the_last_step_of_a_chain_is_action() -> None:
    steps = [ChainStep("What is seen?", BOX, True, "a nodule"), ChainStep("Is it smooth?", WHOLE_IMAGE, True, "yes")]
    turns = chain_prompt(STUDY, FOLDER, BRIEF, steps)
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
    assert len(collect_views(turns)) == 4 + 1 + 1  # the whole image once
    given = chain_prompt(STUDY, FOLDER, BRIEF, [*steps[:1], ChainStep("Is it smooth?", WHOLE_IMAGE, False, "yes")])
    assert [t.action for t in given] == [False] * 7 + [True]  # a region that a grounder proposed is input


def test_a_judge_sees_image_crop_question_and_answer_only() -> None:
    (turn,) = judge_prompt(STUDY, FOLDER, BRIEF, question="Which side?", answer="left", box=BOX)
    assert turn.text == "[10, 20, 30, 40] Which side? left?"
    assert turn.pictures == (*build_whole_views(STUDY, FOLDER, BRIEF), build_crop_view(STUDY, FOLDER, BRIEF, BOX))
    assert not turn.action


def test_the_finding_prompt_shows_only_the_crop() -> None:
    (turn,) = finding_prompt(STUDY, FOLDER, BRIEF, finding="a nodule", box=BOX)
    assert turn.text == "Is there a nodule?"
    assert turn.pictures == (build_crop_view(STUDY, FOLDER, BRIEF, BOX),)


def test_a_rating_is_requested_in_the_last_turn() -> None:
    asked = judge_prompt(STUDY, FOLDER, BRIEF, question="Which side?", answer="left", box=BOX)
    (turn,) = rating_prompt(asked)
    assert turn.text.startswith("[10, 20, 30, 40] Which side? left?\n")
    assert "n/10" in turn.text
    assert turn.pictures == asked[0].pictures
    assert with_answer(asked, "yes") == (*asked, Turn("assistant", "yes", action=True))


def test_a_checkpoint_without_a_file_has_the_default_format(tmp_path: Path) -> None:
    assert load_prompt_format(tmp_path) == PromptFormat()
    save_prompt_format(tmp_path, BRIEF)
    assert load_prompt_format(tmp_path) == BRIEF


@pytest.mark.parametrize(
    ("text", "says"), [('{"crop_pixels": 3}', "crop_pixels"), ('{"min_crop": 0}', "min_crop"), ("{", "not JSON")]
)
def test_an_invalid_prompt_format_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / PROMPT_FORMAT_FILE).write_text(text)
    with pytest.raises(InvalidRecord) as refused:
        load_prompt_format(tmp_path)
    assert str(tmp_path / PROMPT_FORMAT_FILE) in str(refused.value)
    assert says in str(refused.value)


def test_the_prompt_digest_depends_on_wording_and_sizes() -> None:
    views = [PromptFormat(), BRIEF, PromptFormat(crop_px=64), PromptFormat(min_crop=0.5)]
    assert len({hash_prompt(v) for v in views}) == len(views)
    assert hash_prompt(PromptFormat()) == hash_prompt(PromptFormat())
    assert PROMPT_TEMPLATES["full"].digest != PROMPT_TEMPLATES["brief"].digest


def test_a_view_is_identified_by_content_box_and_size() -> None:
    key = ImageView("a.png", "1" * 64, BOX, 64).key
    assert ImageView("b.png", "1" * 64, BOX, 64).key == key
    others = [
        ImageView("a.png", "2" * 64, BOX, 64),
        ImageView("a.png", "1" * 64, None, 64),
        ImageView("a.png", "1" * 64, BOX),
    ]
    assert key not in {p.key for p in others}
