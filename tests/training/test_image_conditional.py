"""Blanked crops: the same conversation, the same sizes, nothing to see where the policy looked."""

from __future__ import annotations

from pathlib import Path

from clincot.models.encoding import read_picture
from clincot.prompts import PromptFormat
from clincot.records import Study
from clincot.training.image_conditional import blank_crops
from tests.support.training_builders import LEFT, conversation


def test_the_crop_is_black_and_everything_else_is_as_it_was(
    studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    whole = conversation(studies[0], folder, views, box=LEFT, answer="yes", written=True)
    blanked = blank_crops(whole, tmp_path / "blank")
    opening, region, crop, answer = blanked
    assert (opening, region, answer) == (whole[0], whole[1], whole[3])
    (picture,) = crop.pictures
    seen = read_picture(picture)
    assert seen.size == read_picture(whole[2].pictures[0]).size == (64, 64)
    assert seen.getextrema() == ((0, 0), (0, 0), (0, 0))
    assert read_picture(whole[2].pictures[0]).getextrema() != seen.getextrema()


def test_blanked_crops_keep_their_size(studies: list[Study], folder: Path, tmp_path: Path) -> None:
    """A policy without a crop size sees the crop as it is cut; another size would be another number of image tokens."""
    views = PromptFormat(min_crop=0.1)
    whole = conversation(studies[0], folder, views, box=LEFT, answer="yes")
    (picture,) = blank_crops(whole, tmp_path)[2].pictures
    assert read_picture(picture).size == read_picture(whole[2].pictures[0]).size
