"""Image-conditional pairs: the same text on a blanked crop, as the rejected side [mDPO, arXiv 2406.11839; MMedPO].

A policy that finds its answer as likely without the crop as with it has not looked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from clincot.jsonl import hash_files
from clincot.models.encoding import read_picture
from clincot.prompts import Conversation, ImageView


def blank_crops(conversation: Conversation, folder: Path) -> Conversation:
    """The conversation with every crop black, at its own size; the whole image stays. Black files go to `folder`.

    A crop is a picture that is shown after the assistant named a region.
    """
    region_named = False
    turns = []
    for turn in conversation:
        region_named = region_named or turn.role == "assistant"
        pictures = tuple(_blank_picture(p, folder) for p in turn.pictures) if region_named else turn.pictures
        turns.append(replace(turn, pictures=pictures))
    return tuple(turns)


def _blank_picture(picture: ImageView, folder: Path) -> ImageView:
    width, height = read_picture(picture).size
    path = folder / f"black-{width}x{height}.png"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height)).save(path)
    return ImageView(str(path), hash_files(path))
