"""A small policy that sees brightness: what it says is computed from the very pixels that it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clincot.geometry import Box, box_from_pixels
from clincot.images import open_image, render_view
from clincot.jsonl import hash_files
from clincot.models.protocols import Generation
from clincot.prompts import Conversation, ImageView, PromptFormat
from clincot.records import Question, Study

SIDE = 128


def brightness(picture: ImageView) -> float:
    """Mean grey value of a picture as it is shown, in [0, 1]."""
    shown = render_view(open_image(Path(picture.path)), picture.box, picture.side_px).convert("L")
    return float(np.asarray(shown, dtype=np.float64).mean() / 255)


class BrightPolicy:
    """P(yes) is the brightness of the last picture; what it writes is one of `words`, by its seed."""

    def __init__(self, words: Sequence[str] = ("bright", "dark")) -> None:
        self.words = tuple(words)
        self.digest = "bright-policy"
        self.views = PromptFormat(wording="brief")
        self.asked: list[Conversation] = []
        self.batches: list[int] = []

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        self.asked += conversations
        self.batches.append(len(conversations))
        chosen = [0 if temperature == 0 else seed % len(self.words) for seed in seeds]
        return [Generation(self.words[n], (-0.5, -0.25)) for n in chosen]

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        self.asked += conversations
        return [round(brightness(conversation[-1].pictures[-1]), 6) for conversation in conversations]

    def compute_relevance(self, conversations: Sequence[Conversation]) -> list[npt.NDArray[np.float32]]:
        """8 x 8 patches of each last picture: how far each is above the mean of all pictures asked about."""
        self.asked += conversations
        patches = [_patches(conversation[-1].pictures[-1]) for conversation in conversations]
        return [one - np.mean(patches) for one in patches]


def _patches(picture: ImageView) -> npt.NDArray[np.float32]:
    shown = render_view(open_image(Path(picture.path)), picture.box, picture.side_px).convert("L")
    return np.asarray(shown.resize((8, 8), Image.Resampling.BOX), dtype=np.float32)


def film(folder: Path, name: str, x: int, y: int, side: int = 32) -> tuple[Study, Box]:
    """A black film of 128 px with one white square."""
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    pixels[y : y + side, x : x + side] = 255
    Image.fromarray(pixels).save(folder / name)
    study = Study(image=name, sha256=hash_files(folder / name), width=SIDE, height=SIDE)
    return study, box_from_pixels(x, y, x + side, y + side, width=SIDE, height=SIDE)


def ask(study: Study, text: str = "Is there a nodule?") -> Question:
    return Question(study=study.id, text=text, kind="closed")
