"""The images and texts that policies and judges receive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clincot.geometry import WHOLE_IMAGE, RegionForm, SmartResize, box_from_xyxy
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
    compute_region_size,
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
PIXELS = PromptFormat(region_form="pixels", resize=SmartResize(factor=28, min_pixels=3136, max_pixels=1003520))
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


def test_percent_keeps_the_bytes_of_older_checkpoints(tmp_path: Path) -> None:
    """Digests and files as they were before formats had a region form."""
    assert hash_prompt(PromptFormat()) == "72ff4ccb338c911f6ee2"
    assert hash_prompt(PromptFormat(), report=True) == "55358c9ac6563e02060d"
    assert hash_prompt(BRIEF) == "495baeb1db67328eecb8"
    assert [PROMPT_TEMPLATES[name].digest for name in ("full", "brief")] == [
        "125209c997915f34d839",
        "f7054be63087c068559d",
    ]
    save_prompt_format(tmp_path, BRIEF)
    assert (tmp_path / PROMPT_FORMAT_FILE).read_text() == (
        '{\n  "wording": "brief",\n  "whole_grid": 2,\n  "whole_px": 64,\n  "crop_px": 32,\n  "min_crop": 0.25\n}\n'
    )


@pytest.mark.parametrize(
    ("model_type", "form"),
    [
        ("qwen2_vl", "qwen2_box"),
        ("qwen2_5_vl", "pixels"),
        ("qwen3_vl", "thousand"),
        ("internvl", "internvl_box"),
        ("paligemma", "loc"),
        ("idefics3", "percent"),
        ("llava", "percent"),
        (None, "percent"),
    ],
)
def test_the_family_chooses_the_form(model_type: str | None, form: RegionForm, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    views = load_prompt_format(tmp_path)
    assert views.region_form == form
    save_prompt_format(tmp_path, views)  # as training does
    assert load_prompt_format(tmp_path) == views
    (tmp_path / PROMPT_FORMAT_FILE).write_text("{}")  # a format that was written before there were forms
    assert load_prompt_format(tmp_path) == PromptFormat()


QWENS_OWN = SmartResize(factor=28, min_pixels=3136, max_pixels=1003520)  # the image processor's class attributes


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, QWENS_OWN),
        # the older layout, in which Qwen2.5-VL was published
        (
            {
                "preprocessor_config.json": {
                    "min_pixels": 3136,
                    "max_pixels": 12845056,
                    "patch_size": 14,
                    "merge_size": 2,
                }
            },
            SmartResize(factor=28, min_pixels=3136, max_pixels=12845056),
        ),
        # as transformers 5 saves it, next to an older file that it no longer reads
        (
            {
                "processor_config.json": {
                    "image_processor": {
                        "size": {"shortest_edge": 512, "longest_edge": 3072},
                        "patch_size": 8,
                        "merge_size": 2,
                    }
                },
                "preprocessor_config.json": {"min_pixels": 1},
            },
            SmartResize(factor=16, min_pixels=512, max_pixels=3072),
        ),
        ({"processor_config.json": {"processor_class": "X"}, "preprocessor_config.json": {"patch_size": 7}}, None),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_pixels_are_the_processors(
    files: dict[str, Any], expected: SmartResize | None, named: bool, tmp_path: Path
) -> None:
    """Whether the family or the checkpoint's own file names the form, the resize is read from the processor's file."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    if named:
        (tmp_path / PROMPT_FORMAT_FILE).write_text('{"region_form": "pixels"}')
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_prompt_format(tmp_path).resize == (expected or QWENS_OWN.model_copy(update={"factor": 14}))


def test_the_size_of_pixels_is_the_models_view() -> None:
    """200 x 100 px: 7.1 and 3.6 patches of 28; with a longest side of 400, 14.3 and 7.1."""
    assert compute_region_size(STUDY, PIXELS) == (196, 112)
    assert compute_region_size(STUDY, PIXELS.model_copy(update={"whole_px": 400})) == (392, 196)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"region_form": "pixels", "resize": null}', "belong together"),
        ('{"resize": {"factor": 28, "min_pixels": 1, "max_pixels": 9}}', "belong together"),
        ('{"region_form": "pixels", "whole_grid": 2}', "whole_grid"),
        ('{"region_form": "furlongs"}', "region_form"),
        ("[]", "JSON object"),
    ],
)
def test_an_impossible_region_form_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / PROMPT_FORMAT_FILE).write_text(text)
    with pytest.raises(InvalidRecord, match=says) as refused:
        load_prompt_format(tmp_path)
    assert str(tmp_path / PROMPT_FORMAT_FILE) in str(refused.value)


@pytest.mark.parametrize(
    ("views", "look", "region"),
    [
        (PIXELS, "[x1, y1, x2, y2] in pixels.", "[20, 22, 59, 45]"),  # of 196 x 112
        (PromptFormat(region_form="thousand"), "[x1, y1, x2, y2] with coordinates from 0 to", "[100, 200, 300, 400]"),
        (PromptFormat(region_form="qwen2_box"), "(x1,y1),(x2,y2)", "<|box_start|>(100,200),(300,400)<|box_end|>"),
        (PromptFormat(region_form="internvl_box"), "[[x1, y1, x2, y2]]", "<box>[[100, 200, 300, 400]]</box>"),
    ],
)
def test_prompts_speak_the_policys_form(views: PromptFormat, look: str, region: str) -> None:
    first, written, _ = chain_prompt(STUDY, FOLDER, views, [ChainStep("Which side?", BOX, written=True)])
    assert look in first.text
    assert "percent" not in first.text
    assert written.text == region
    (judged,) = judge_prompt(STUDY, FOLDER, views, question="Which side?", answer="left", box=BOX)
    assert f"the region {region} of the first (" in judged.text
    assert "percent" not in judged.text


def test_paligemma_is_asked_by_the_findings_name() -> None:
    """Its own prompt asks for a region; the chain of an answer opens with the question, since the region is known."""
    views = PromptFormat(region_form="loc")
    (asked,) = region_prompt(STUDY, FOLDER, views, "Is there a nodule?", finding="nodule")
    assert asked.text == "detect nodule"
    first, region, _ = chain_prompt(STUDY, FOLDER, views, [ChainStep("Is there a nodule?", BOX, written=False)])
    assert (first.text, region.text) == ("Is there a nodule?", "<loc0205><loc0102><loc0409><loc0307>")
    (named,) = region_prompt(STUDY, FOLDER, PromptFormat(), "Is there a nodule?", finding="nodule")
    assert named == region_prompt(STUDY, FOLDER, PromptFormat(), "Is there a nodule?")[0]  # other families read all


def test_the_prompt_digest_depends_on_wording_and_sizes() -> None:
    views = [PromptFormat(), BRIEF, PromptFormat(crop_px=64), PromptFormat(min_crop=0.5), PIXELS]
    views += [PIXELS.model_copy(update={"resize": SmartResize(factor=28, min_pixels=3136, max_pixels=9**7)})]
    views += [PromptFormat(region_form="loc"), PromptFormat(region_form="thousand")]
    views += [PromptFormat(wording="brief", region_form="loc"), PromptFormat(wording="brief", region_form="thousand")]
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
