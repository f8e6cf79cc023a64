"""Small real records and judges for the judge tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clincot.errors import ModelFailed
from clincot.geometry import Box, box_from_xyxy, box_to_pixels, box_to_text
from clincot.jsonl import hash_files
from clincot.judging.asking import JudgeRequest
from clincot.prompts import Conversation, PromptFormat, collect_views
from clincot.records import Candidate, PanelScore, Study

SIDE = 96
DARK = box_from_xyxy((0.0, 0.0, 0.25, 0.25))
EDGE = box_from_xyxy((0.375, 0.0, 0.625, 0.25))  # columns 36 to 59: half black, half white
BRIGHT = box_from_xyxy((0.75, 0.0, 1.0, 0.25))


def half_and_half(folder: Path) -> Study:
    """A real image file, black on the left and white on the right."""
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    pixels[:, SIDE // 2 :] = 255
    Image.fromarray(pixels).save(folder / "half.png")
    return Study(image="half.png", sha256=hash_files(folder / "half.png"), width=SIDE, height=SIDE)


def ask(study: Study, box: Box, answer: str, number: int = 0) -> JudgeRequest:
    return JudgeRequest(candidate=f"candidate-{number}", study=study, question="Is it bright?", box=box, answer=answer)


class BrightnessJudge:
    """P(yes) = mean brightness of the crop it is shown, in [0, 1]."""

    name = "brightness"
    digest = "brightness-1"
    views = PromptFormat(wording="brief", min_crop=0.25)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        return [self._brightness(conversation) for conversation in conversations]

    def _brightness(self, conversation: Conversation) -> float:
        crop = collect_views(conversation)[-1]
        assert crop.box is not None
        with Image.open(crop.path) as image:
            x0, y0, x1, y1 = box_to_pixels(crop.box, width=image.width, height=image.height)
            return float(np.asarray(image)[y0:y1, x0:x1].mean()) / 255


class WordJudge:
    """P(yes) = 0.9 where the proposed answer says yes, 0.2 where it says no, no opinion otherwise."""

    def __init__(self, name: str = "words") -> None:
        self.name = name
        self.digest = f"{name}-1"
        self.views = PromptFormat(wording="brief")

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        answers = [conversation[0].text.partition("Is it bright? ")[2] for conversation in conversations]
        return [{"yes?": 0.9, "no?": 0.2}.get(answer) for answer in answers]


class FailingJudge(WordJudge):
    """A WordJudge whose calls with the given numbers (0-based) fail as an endpoint's do."""

    def __init__(self, fails: Sequence[int], name: str = "failing") -> None:
        super().__init__(name)
        self.fails = set(fails)
        self.calls = 0

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        call, self.calls = self.calls, self.calls + 1
        if call in self.fails:
            raise ModelFailed(f"HTTP 500 from {self.name}")
        return super().p_yes(conversations)


class FixedJudge(WordJudge):
    """Gives exactly the replies it was built with, whatever they are."""

    def __init__(self, replies: list[float | None], name: str = "fixed") -> None:
        super().__init__(name)
        self.replies = replies

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        return self.replies


LEFT = box_from_xyxy((0.1, 0.1, 0.3, 0.3))
RIGHT = box_from_xyxy((0.6, 0.1, 0.8, 0.3))


def candidate(
    text: str,
    *,
    question: str = "question-1",
    box: Box = LEFT,
    written: bool = False,
    step: int = 0,
    parent: str = "",
    seed: int = 0,
    prompt: str = "prompt",
) -> Candidate:
    return Candidate(
        question=question,
        region=f"region-{box_to_text(box)}",
        text=text,
        token_logprobs=(-0.5,) * (len(text.split()) + 1),
        region_written=written,
        step=step,
        parent=parent,
        policy="policy",
        prompt=prompt,
        seed=seed,
        temperature=0.7,
    )


def score_of(one: Candidate, score: float | None, *, spread: float = 0.1, judges: int = 2) -> PanelScore:
    return PanelScore(
        candidate=one.id, score=score, spread=spread, judges=judges, reason="" if score is not None else "no quorum"
    )
