"""The image processor of PIL wherever the family has one: the same pixels with and without torchvision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from clincot.models.encoding import read_picture
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import ImageView, build_whole_views
from clincot.records import Study
from tests.support.families import Family, has_torchvision


@pytest.fixture
def pictures(studies: list[Study], films: Path, model: VisionLanguageModel) -> list[ImageView]:
    """Films of three shapes."""
    return [view for study in studies[:3] for view in build_whole_views(study, films, model.views)]


def test_pil_makes_the_pixels_where_it_can(family: Family, model: VisionLanguageModel) -> None:
    """A family with a video processor needs torchvision, and then uses its image processor as well."""
    name = type(model.encoder.processor.image_processor).__name__
    assert name.endswith("Pil") == (not family.needs_torchvision), name


@pytest.mark.skipif(not has_torchvision(), reason="compares with torchvision; `make test-families` has it")
def test_pixels_are_those_of_the_checkpoints_own_processor(
    family: Family, checkpoint: Path, model: VisionLanguageModel, pictures: list[ImageView]
) -> None:
    """What AutoProcessor makes without being asked for PIL: torchvision's image processor.

    Equal where torchvision is used here too. The two resample 8-bit pictures with other rounding: one grey level of 255
    with bicubic and bilinear filters (Llava, LlavaNext, Gemma3, PaliGemma), two with Lanczos (Idefics3).
    """
    own = AutoProcessor.from_pretrained(checkpoint).image_processor
    assert not type(own).__name__.endswith("Pil")
    ours = model.encoder.processor.image_processor
    grey_level = 1 / (255 * min(ours.image_std))
    tolerance = {"idefics3": 2.01 * grey_level}.get(family.name, 0.0 if family.needs_torchvision else 1.01 * grey_level)
    for picture in pictures:
        images = [[read_picture(picture)]]
        made, expected = (one(images, return_tensors="pt")["pixel_values"] for one in (ours, own))
        assert made.shape == expected.shape
        assert torch.allclose(made, expected, rtol=0.0, atol=tolerance)
