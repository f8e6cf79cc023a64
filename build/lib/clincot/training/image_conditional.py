"""Image-conditional pairs: the chosen text on a blanked crop as the rejected side [mDPO, arXiv 2406.11839; MMedPO].

A policy that finds its answer as likely without the crop as with it has not used the image.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from clincot.jsonl import hash_files
from clincot.models.encoding import read_picture
from clincot.prompts import Conversation, ImageView


def blank_crops(conversation: Conversation, folder: Path) -> Conversation:
    """Replace every crop by a black picture of its size and keep the whole image; black pictures are put in `folder`.

    A crop is a picture that is shown after the assistant has named a region.
    """
    region_named = False
    turns = []
    for turn in conversation:
        region_named = region_named or turn.role == "assistant"
        pictures = turn.pictures
        if region_named:
            pictures = tuple(_blank_picture(picture, folder) for picture in pictures)
        turns.append(replace(turn, pictures=pictures))
    return tuple(turns)


def _blank_picture(picture: ImageView, folder: Path) -> ImageView:
    width, height = read_picture(picture).size
    path = folder / f"black-{width}x{height}.png"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height)).save(path)
    return ImageView(str(path), hash_files(path))
