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


# For judges that rate along a scale: appended like RATING_INSTRUCTION.
RUBRIC_INSTRUCTION = (
    "Instead of yes or no, rate the proposed answer from 0 to 10: 10 if it is certainly right, 8 if it is right but "
    "for a detail, 5 if it is as likely right as wrong, 2 if it is mostly wrong, 0 if it is certainly wrong. Write the "
    "rating in the form n/10 and nothing else."
)

# For language models without image input, which judge from text only. The lines in braces with nothing to say are
# left out.
_TEXT_JUDGE = (
    "A question about a medical image was answered. You cannot see the image; judge from what is written here.\n"
    "Question: {question}\n"
    "Region of the image from which it was answered: {region}\n"
    "{finding}{reference}"
    "Proposed answer: {answer}\n"
    "Is the proposed answer right? Answer yes or no."
)
_TEXT_FINDING = "What was looked for in that region: {finding}\n"
_TEXT_REFERENCE = "Reference answer: {reference}\n"


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


def text_judge_prompt(*, question: str, answer: str, box: Box, finding: str = "", reference: str = "") -> Conversation:
    """Build the prompt that asks a text-only judge about a candidate: no image, the region in words.

    finding: the hypothesis for which the region was proposed. reference: the right answer. It is the answer key, so it
    is "" wherever the scores enter a round. Empty ones are left out.
    """
    text = _TEXT_JUDGE.format(
        question=question,
        region=describe_box(box),
        finding=_TEXT_FINDING.format(finding=finding) if finding else "",
        reference=_TEXT_REFERENCE.format(reference=reference) if reference else "",
        answer=answer,
    )
    return (Turn("user", text),)


_PLACES = (
    ("the upper left part", "the upper part", "the upper right part"),
    ("the left part", "the centre", "the right part"),
    ("the lower left part", "the lower part", "the lower right part"),
)


def describe_box(box: Box) -> str:
    """A box in words, such as "the upper left part, 20 % of the width and 30 % of the height".

    Left and right are those of the image, not the patient's.
    """
    if box == WHOLE_IMAGE:
        return "the whole image"
    column, row = (min(int(center * 3), 2) for center in box.center)
    width, height = round((box.x1 - box.x0) * 100), round((box.y1 - box.y0) * 100)
    return f"{_PLACES[row][column]}, {width} % of the width and {height} % of the height"


def rating_prompt(conversation: Conversation, instruction: str = RATING_INSTRUCTION) -> Conversation:
    """Rewrite a judge's prompt so that it asks for a rating instead of yes or no."""
    *before, last = conversation
    return (*before, replace(last, text=f"{last.text}\n{instruction}"))


def finding_prompt(study: Study, folder: Path, views: PromptFormat, *, finding: str, box: Box) -> Conversation:
    """Build the prompt that asks whether a region shows a finding, for the sliding-window grounder."""
    text = PROMPT_TEMPLATES[views.wording].finding.format(finding=finding)
    return (Turn("user", text, (build_crop_view(study, folder, views, box),)),)


def hash_prompt(views: PromptFormat, *, report: bool = False) -> str:
    """Identify the wording and the image sizes of a prompt. report: the answer is a whole report."""
    wording = PROMPT_TEMPLATES[views.wording]
    return hash_json([wording.digest, views.model_dump(mode="json"), *[wording.report] * report])[:20]


@dataclass(frozen=True)
class JudgeStyle:
    """What a judge is shown and asked for, beyond the PromptFormat; the defaults are image, crop and yes or no."""

    form: Literal["yes_no", "rating", "rubric"] = "yes_no"
    text_only: bool = False
    reference: bool = False  # the prompt holds the right answer


def hash_judge_prompt(views: PromptFormat, style: JudgeStyle) -> str:
    """Identify a judge's prompt: as `hash_prompt`, unless the style is another one.

    A rating has no part in it, as in earlier versions; the judge's digest covers it.
    """
    base = hash_prompt(views)
    if style.form != "rubric" and not style.text_only and not style.reference:
        return base
    wording = [RUBRIC_INSTRUCTION if style.form == "rubric" else ""]
    if style.text_only:
        wording += [_TEXT_JUDGE, _TEXT_FINDING, _TEXT_REFERENCE]
    return hash_json([base, style.form, style.text_only, style.reference, wording])[:20]


def collect_views(conversation: Sequence[Turn]) -> list[ImageView]:
    """List the images of a conversation in their order."""
    views: list[ImageView] = []
    for turn in conversation:
        views += turn.pictures
    return views
