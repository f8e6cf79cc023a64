"""Prompts: the images and texts that policies and judges receive. All prompt texts are in this module.

A visual chain of thought is one conversation:

    user       the whole image, the question
    assistant  the region to look at            written by the policy, or proposed by a grounder
    user       that region at full resolution
    assistant  the answer

A checkpoint is prompted with the wording and the image sizes that it was trained with (`PromptFormat`, stored with
the weights as clincot.json). A checkpoint without that file gets the defaults, whose wording is complete.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from clincot.fields import FrozenModel
from clincot.geometry import WHOLE_IMAGE, Box, box_from_xyxy, box_to_text, crop_square
from clincot.jsonl import InvalidRecord, format_validation_error
from clincot.records import Study, hash_json

PROMPT_FORMAT_FILE = "clincot.json"


class PromptFormat(FrozenModel):
    """The wording and the image sizes that a checkpoint expects."""

    wording: Literal["full", "brief"] = "full"
    whole_grid: Annotated[int, Field(ge=1, le=8)] = 1  # the whole image is cut into whole_grid x whole_grid tiles
    whole_px: Annotated[int, Field(ge=16)] | None = None  # longest side of each tile; None: not resized
    crop_px: Annotated[int, Field(ge=16)] | None = None
    min_crop: Annotated[float, Field(gt=0, le=1)] = (
        0.25  # smallest side of a crop, as a share of the image's shorter side
    )


@dataclass(frozen=True)
class ImageView:
    """An image or a crop of it, at the size that a model sees. The file is read only when a model needs it."""

    path: str
    sha256: str  # of the image file
    box: Box | None = None  # None: the whole image
    side_px: int | None = None

    @cached_property
    def key(self) -> str:
        """Identifies the content of the view, independent of the file's path."""
        box = "" if self.box is None else ",".join(f"{v:.4f}" for v in self.box.xyxy)
        return f"{self.sha256}:{box}:{self.side_px}"


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. `action` marks text that the policy wrote; only its tokens enter a loss."""

    role: Literal["user", "assistant"]
    text: str
    pictures: tuple[ImageView, ...] = ()
    action: bool = False


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class PromptTemplate:
    """The texts around a question, with the placeholders {question}, {answer}, {region} and {finding}."""

    look: str
    crop: str
    report: str  # replaces `crop` if the answer is a whole report
    judge: str
    finding: str

    @property
    def digest(self) -> str:
        """Identifies the wording in record ids. `report` is left out, so that older ids keep their value."""
        return hash_json([self.look, self.crop, self.judge, self.finding])[:20]


PROMPT_TEMPLATES: dict[str, PromptTemplate] = {
    "full": PromptTemplate(
        look="{question}\nFirst name the region of the image to look at, as [x0, y0, x1, y1] in percent of its "
        "width and height.",
        crop="This is that region at full resolution. Answer the question in a few words: {question}",
        report="This is that region at full resolution. {question} Write a report of the whole image in a few "
        "sentences: what is seen, on which side, and what is not.",
        judge="The second image is the region {region} of the first (percent of its width and height) at full "
        "resolution.\nQuestion: {question}\n"
        "Proposed answer: {answer}\nIs the proposed answer right? Answer yes or no.",
        finding="Does this region of a medical image show {finding}? Answer yes or no.",
    ),
    # For the tiny models, which are trained with it: every further word would cost a token per question.
    "brief": PromptTemplate(
        look="{question}", crop="", report="", judge="{region} {question} {answer}?", finding="Is there {finding}?"
    ),
}


# For judges without log-probabilities: appended to the question that asks for yes or no.
RATING_INSTRUCTION = (
    "Instead of yes or no, write how sure you are that it is right, from 0 (surely wrong) to 10 (surely right), in the "
    "form n/10 and nothing else."
)


def load_prompt_format(checkpoint: Path) -> PromptFormat:
    """Load the PromptFormat of a checkpoint folder, or the defaults if it has none. Raises InvalidRecord."""
    path = checkpoint / PROMPT_FORMAT_FILE
    if not path.is_file():
        return PromptFormat()
    try:
        return PromptFormat.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise InvalidRecord(f"{path}: not a prompt format: {format_validation_error(error)}") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord(f"{path}:{error.lineno}: not JSON ({error.msg})") from None


def save_prompt_format(checkpoint: Path, views: PromptFormat) -> None:
    """Write the PromptFormat into a checkpoint folder."""
    (checkpoint / PROMPT_FORMAT_FILE).write_text(views.model_dump_json(indent=2) + "\n", encoding="utf-8")


def build_whole_views(study: Study, folder: Path, views: PromptFormat) -> tuple[ImageView, ...]:
    """Build the views of the whole image: one view, or a grid of tiles in reading order."""
    path, n = str(folder / study.image), views.whole_grid
    if n == 1:
        return (ImageView(path, study.sha256, None, views.whole_px),)
    tiles = []
    for row, column in product(range(n), repeat=2):
        box = box_from_xyxy((column / n, row / n, (column + 1) / n, (row + 1) / n))
        tiles.append(ImageView(path, study.sha256, box, views.whole_px))
    return tuple(tiles)


def build_crop_view(study: Study, folder: Path, views: PromptFormat, box: Box) -> ImageView:
    """Build the view of a region: its square crop (geometry.crop_square) at the checkpoint's crop size."""
    shown = box if box == WHOLE_IMAGE else crop_square(box, min_side=views.min_crop, aspect=study.width / study.height)
    return ImageView(str(folder / study.image), study.sha256, shown, views.crop_px)


def region_prompt(study: Study, folder: Path, views: PromptFormat, question: str) -> Conversation:
    """Build the first turn: the whole image and the question. The policy replies with a region."""
    text = PROMPT_TEMPLATES[views.wording].look.format(question=question)
    return (Turn("user", text, build_whole_views(study, folder, views)),)


@dataclass(frozen=True)
class ChainStep:
    """One step of a visual chain: question, region, and answer (None: not answered yet)."""

    question: str
    box: Box
    written: bool  # the policy wrote the region itself
    answer: str | None = None
    report: bool = False  # the answer is a whole report


def answer_prompt(
    opening: Conversation, study: Study, folder: Path, views: PromptFormat, step: ChainStep
) -> Conversation:
    """Append the region of `step` and its crop to `opening`. The policy replies with an answer."""
    region = Turn("assistant", box_to_text(step.box), action=step.written)
    wording = PROMPT_TEMPLATES[views.wording]
    text = (wording.report if step.report else wording.crop).format(question=step.question)
    return (*opening, region, Turn("user", text, (build_crop_view(study, folder, views, step.box),)))


def chain_prompt(study: Study, folder: Path, views: PromptFormat, steps: Sequence[ChainStep]) -> Conversation:
    """Build the conversation of a chain. Only turns of the last step are actions; earlier steps are context."""
    conversation: Conversation = ()
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if position == 0:
            conversation = region_prompt(study, folder, views, step.question)
        else:
            text = PROMPT_TEMPLATES[views.wording].look.format(question=step.question)
            conversation = (*conversation, Turn("user", text))
        step = replace(step, written=step.written and last)
        conversation = answer_prompt(conversation, study, folder, views, step)
        if step.answer is not None:
            conversation = (*conversation, Turn("assistant", step.answer, action=last))
    return conversation


def with_answer(conversation: Conversation, answer: str) -> Conversation:
    """Append the policy's answer, whose tokens enter the loss."""
    return (*conversation, Turn("assistant", answer, action=True))


def judge_prompt(
    study: Study, folder: Path, views: PromptFormat, *, question: str, answer: str, box: Box
) -> Conversation:
    """Build the prompt that asks a judge about a candidate: image, crop, question and proposed answer only."""
    text = PROMPT_TEMPLATES[views.wording].judge.format(question=question, answer=answer, region=box_to_text(box))
    images = (*build_whole_views(study, folder, views), build_crop_view(study, folder, views, box))
    return (Turn("user", text, images),)


def rating_prompt(conversation: Conversation) -> Conversation:
    """Rewrite a judge's prompt so that it asks for a rating instead of yes or no."""
    *before, last = conversation
    return (*before, replace(last, text=f"{last.text}\n{RATING_INSTRUCTION}"))


def finding_prompt(study: Study, folder: Path, views: PromptFormat, *, finding: str, box: Box) -> Conversation:
    """Build the prompt that asks whether a region shows a finding, for the sliding-window grounder."""
    text = PROMPT_TEMPLATES[views.wording].finding.format(finding=finding)
    return (Turn("user", text, (build_crop_view(study, folder, views, box),)),)


def hash_prompt(views: PromptFormat, *, report: bool = False) -> str:
    """Identify the wording and the image sizes of a prompt. report: the answer is a whole report."""
    wording = PROMPT_TEMPLATES[views.wording]
    return hash_json([wording.digest, views.model_dump(mode="json"), *[wording.report] * report])[:20]


def collect_views(conversation: Sequence[Turn]) -> list[ImageView]:
    """List the images of a conversation in their order."""
    views: list[ImageView] = []
    for turn in conversation:
        views += turn.pictures
    return views
