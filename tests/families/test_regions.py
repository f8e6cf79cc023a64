"""Each family writes a region in the form it was trained on, and all forms become the same box."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from clincot.generation.grounders import REGION_TOKENS, WrittenGrounder
from clincot.geometry import Box, RegionForm, SmartResize, box_from_xyxy, parse_region, region_to_text
from clincot.images import open_image, render_view
from clincot.models.protocols import Generation, GroundingQuery
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import (
    ChainStep,
    Conversation,
    PromptFormat,
    build_whole_views,
    chain_prompt,
    compute_region_size,
    format_region,
    judge_prompt,
    region_prompt,
    with_answer,
)
from clincot.records import Question, Study
from tests.support.families import Family

FORMS: dict[str, RegionForm] = {
    "qwen2-vl": "qwen2_box",
    "qwen2.5-vl": "pixels",
    "qwen3-vl": "thousand",
    "internvl": "internvl_box",
    "paligemma": "loc",
}
MARKERS = {"qwen2-vl": ("<|box_start|>", "<|box_end|>"), "internvl": ("<box>", "</box>")}
QUESTION = "Is there a nodule in the left lung?"
BOXES = [
    box_from_xyxy((0.05, 0.1, 0.4, 0.45)),
    box_from_xyxy((0.1, 0.3, 0.95, 0.6)),
    box_from_xyxy((0.0, 0.0, 1.0, 1.0)),
    box_from_xyxy((0.5, 0.5, 0.51, 0.52)),
]


def tolerance(study: Study, views: PromptFormat) -> float:
    """One unit of the form, as a share of the image; 1.5 pixels, for a thin region at the last one."""
    units = {"percent": 100, "pixels": min(compute_region_size(study, views)) / 1.5}.get(views.region_form, 1000)
    return 1 / units + 1e-4


def test_the_form_is_the_familys(family: Family, model: VisionLanguageModel) -> None:
    assert model.views.region_form == FORMS.get(family.name, "percent")


def test_pixels_are_those_of_the_processor(model: VisionLanguageModel, studies: list[Study], films: Path) -> None:
    """The unit of a pixel form is the grid that the processor makes of the whole image, at every size and shape."""
    if model.views.region_form != "pixels":
        assert model.views.resize is None
        return
    patch = model.encoder.processor.image_processor.patch_size
    for side in (None, 30, 57, 144, 500):
        views = model.views.model_copy(update={"whole_px": side})
        for study in studies:
            (view,) = build_whole_views(study, films, views)
            (grid,) = model.encoder.stack_pictures([[view]])["image_grid_thw"].tolist()
            assert compute_region_size(study, views) == (grid[2] * patch, grid[1] * patch)


def test_sizes_are_those_of_transformers_own_function() -> None:
    """smart_resize itself, over a grid of sizes, and the view's size before it."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    resize = SmartResize(factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    for width in (1, 13, 14, 28, 97, 800, 1024, 2500, 4096):
        for height in (1, 14, 42, 43, 600, 1001, 3000):
            if max(width, height) / min(width, height) <= 200:
                expected = module.smart_resize(height, width, 28, 56 * 56, 28 * 28 * 1280)
                assert resize.compute_size(width, height) == (expected[1], expected[0])


def test_whole_views_have_the_size_that_pixels_assume(studies: list[Study], films: Path) -> None:
    for study in studies:
        for side in (None, 33, 77, 640):
            views = PromptFormat(whole_px=side)
            (view,) = build_whole_views(study, films, views)
            shown = render_view(open_image(Path(view.path)), view.box, view.side_px)
            assert compute_region_size(study, views) == shown.size


def test_the_region_turn_decodes_to_the_box(
    family: Family, model: VisionLanguageModel, studies: list[Study], films: Path
) -> None:
    """From token ids: as a decoder shows them with and without special tokens."""
    decode = model.encoder.tokenizer.decode
    for study in studies:
        for box in BOXES:
            prompt = chain_prompt(study, films, model.views, [ChainStep(QUESTION, box, family.name != "paligemma")])
            encoded = model.encoder.encode(with_answer(prompt, "no"))
            ids = list(encoded.ids)
            if family.name != "paligemma":  # its regions are context, never actions (models/encoding.py)
                start = encoded.actions.index(True)
                ids = ids[start : start + encoded.actions[start:].index(False)]
                shown = decode(ids[:-1]).strip()  # without the end of the turn
                assert shown == format_region(box, study, model.views)
            size = compute_region_size(study, model.views)
            for skip in (True, False):
                parsed = parse_region(decode(ids, skip_special_tokens=skip), model.views.region_form, size)
                assert parsed is not None
                assert parsed.xyxy == pytest.approx(box.xyxy, abs=tolerance(study, model.views))


def test_markers_and_locations_are_tokens(
    family: Family, model: VisionLanguageModel, studies: list[Study], films: Path
) -> None:
    """As the family was trained: not the markers' letters. In a policy's turn and in a judge's question alike."""
    chain = chain_prompt(studies[0], films, model.views, [ChainStep(QUESTION, BOXES[0], written=False)])
    judged = judge_prompt(studies[0], films, model.views, question=QUESTION, answer="yes", box=BOXES[0])
    words = list(MARKERS.get(family.name, ()))
    if family.name == "paligemma":
        text = format_region(BOXES[0], studies[0], model.views)
        words = [text[at : at + 9] for at in range(0, 36, 9)]
    for conversation in (chain, judged):
        ids = model.encoder.encode(conversation, reply=True).ids
        for word in words:
            assert model.encoder.tokenizer.convert_tokens_to_ids(word) in ids


def test_markers_elsewhere_are_text(
    family: Family, model: VisionLanguageModel, studies: list[Study], films: Path
) -> None:
    """Only a whole region keeps its markers; a data set's own words do not become control tokens."""
    for word in MARKERS.get(family.name, ()):
        question = f"What is {word}(1,2) and {word}?"
        ids = model.encoder.encode(region_prompt(studies[0], films, model.views, question), reply=True).ids
        assert model.encoder.tokenizer.convert_tokens_to_ids(word) not in ids


def write_natively(family: Family, box: Box, study: Study, views: PromptFormat) -> str:
    """The reply of a checkpoint of this family, with what it writes around a region."""
    region = region_to_text(box, views.region_form, compute_region_size(study, views))
    if views.region_form == "loc":
        return f"{region} nodule"
    if family.name in ("qwen2.5-vl", "qwen3-vl"):
        return '[{"bbox_2d": ' + region + ', "label": "nodule"}]'
    return f"nodule {region}" if family.name in MARKERS else region


def test_a_region_that_the_policy_writes_becomes_the_box(
    family: Family,
    model: VisionLanguageModel,
    studies: list[Study],
    films: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ids of a native reply through the model's own decoding; then what is no region, which is counted."""
    tokenizer = model.encoder.tokenizer
    asked: list[Conversation] = []
    texts: list[str] = []

    def generate(conversations: Sequence[Conversation], *, max_new_tokens: int, **_: object) -> list[Generation]:
        asked.extend(conversations)
        replies = []
        for text in texts:
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], min(model.encoder.end_ids)]
            replies.append(model._decode_generation(ids, [-0.01] * len(ids)))
        assert max_new_tokens == REGION_TOKENS[model.views.region_form]
        return replies

    monkeypatch.setattr(model, "generate", generate)
    queries = [GroundingQuery(s, Question(study=s.id, text=QUESTION, kind="closed"), ("nodule",)) for s in studies]
    grounder = WrittenGrounder(model, samples=1, temperature=0.0, seed=0)
    for box in BOXES:
        texts = [write_natively(family, box, study, model.views) for study in studies]
        for study, regions in zip(studies, grounder.ground(queries, films), strict=True):
            (region,) = regions
            assert region.box.xyxy == pytest.approx(box.xyxy, abs=tolerance(study, model.views))
    assert grounder.off_format == 0
    expected = "detect nodule" if family.name == "paligemma" else QUESTION
    assert asked[0][-1].text.startswith(expected)
    texts = ["the left lung", "[40, 40, 10, 10]", "<loc0001><loc0002>"]
    assert grounder.ground(queries[:3], films) == [[], [], []]
    assert grounder.off_format == 3
