"""What a model is shown and asked. Every prompt of the project is worded here and nowhere else.

A visual chain of thought is one conversation:

    user       the whole image, the question
    assistant  the region to look at            written by the policy, or given by a grounding tool
    user       that region at full resolution
    assistant  the answer

The wording and the sizes belong to the checkpoint that was trained with them (`Views`, stored beside the
weights as clincot.json); a checkpoint from elsewhere gets the defaults, which spell everything out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from clincot.fields import FrozenModel
from clincot.geometry import WHOLE_IMAGE, Box, box_from_xyxy, box_to_text, crop_square
from clincot.jsonl import InvalidRecord, format_validation_error
from clincot.records import Study, hash_json

PROMPT_FORMAT_FILE = "clincot.json"


class PromptFormat(FrozenModel):
    """How a checkpoint wants to be shown images, and in which wording it is asked."""

    wording: Literal["full", "brief"] = "full"
    whole_grid: Annotated[int, Field(ge=1, le=8)] = 1  # the whole image as whole_grid x whole_grid pictures
    whole_px: Annotated[int, Field(ge=16)] | None = None  # longest side of each; None: as the image is
    crop_px: Annotated[int, Field(ge=16)] | None = None
    min_crop: Annotated[float, Field(gt=0, le=1)] = 0.25  # M of UV-CoT's crop, as a share of the shorter side


@dataclass(frozen=True)
class ImageView:
    """An image, or a box of it, at the size at which a model sees it. Read only when a model needs it."""

    path: str
    sha256: str  # of the image file
    box: Box | None = None  # None: all of it
    side_px: int | None = None

    @cached_property
    def key(self) -> str:
        """Names what is seen: the same wherever the file lies."""
        box = "" if self.box is None else ",".join(f"{v:.4f}" for v in self.box.xyxy)
        return f"{self.sha256}:{box}:{self.side_px}"


@dataclass(frozen=True)
class Turn:
    """One turn. `action` marks what the policy itself wrote, the only tokens that a loss may count."""

    role: Literal["user", "assistant"]
    text: str
    pictures: tuple[ImageView, ...] = ()
    action: bool = False


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class PromptTemplate:
    """The sentences around a question. {question}, {answer}, {region} and {finding} are filled in."""

    look: str
    crop: str
    report: str  # in place of `crop` where a whole report is asked for
    judge: str
    finding: str

    @property
    def digest(self) -> str:
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
    # For the small models, which were trained on it: every further word would cost them a token a question.
    "brief": PromptTemplate(
        look="{question}", crop="", report="", judge="{region} {question} {answer}?", finding="Is there {finding}?"
    ),
}


# For judges without log-probabilities: said after the question that asks for yes or no.
RATING_INSTRUCTION = (
    "Instead of yes or no, write how sure you are that it is right, from 0 (surely wrong) to 10 (surely right), in the "
    "form n/10 and nothing else."
)


def load_prompt_format(checkpoint: Path) -> PromptFormat:
    """The Views stored beside a checkpoint's weights; the defaults where there are none."""
    path = checkpoint / PROMPT_FORMAT_FILE
    if not path.is_file():
        return PromptFormat()
    try:
        return PromptFormat.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise InvalidRecord(f"{path}: not a description of views: {format_validation_error(error)}") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord(f"{path}:{error.lineno}: not JSON ({error.msg})") from None


def save_prompt_format(checkpoint: Path, views: PromptFormat) -> None:
    (checkpoint / PROMPT_FORMAT_FILE).write_text(views.model_dump_json(indent=2) + "\n", encoding="utf-8")


def build_whole_views(study: Study, folder: Path, views: PromptFormat) -> tuple[ImageView, ...]:
    """The whole image as the checkpoint wants it: one picture, or a grid of them in reading order."""
    path, n = str(folder / study.image), views.whole_grid
    if n == 1:
        return (ImageView(path, study.sha256, None, views.whole_px),)
    cells = [box_from_xyxy((c / n, r / n, (c + 1) / n, (r + 1) / n)) for r in range(n) for c in range(n)]
    return tuple(ImageView(path, study.sha256, cell, views.whole_px) for cell in cells)


def build_crop_view(study: Study, folder: Path, views: PromptFormat, box: Box) -> ImageView:
    """The square that shows a region (geometry.crop_square), at the checkpoint's crop size."""
    shown = box if box == WHOLE_IMAGE else crop_square(box, min_side=views.min_crop, aspect=study.width / study.height)
    return ImageView(str(folder / study.image), study.sha256, shown, views.crop_px)


def region_prompt(study: Study, folder: Path, views: PromptFormat, question: str) -> Conversation:
    """The opening: the whole image and the question. What the policy writes next is a region."""
    text = PROMPT_TEMPLATES[views.wording].look.format(question=question)
    return (Turn("user", text, build_whole_views(study, folder, views)),)


def answer_prompt(
    opening: Conversation,
    study: Study,
    folder: Path,
    views: PromptFormat,
    *,
    question: str,
    box: Box,
    written: bool = False,
    report: bool = False,
) -> Conversation:
    """The opening continued by a region and its crop. `written`: the policy wrote the region itself; `report`: what is
    to follow is a whole report."""
    region = Turn("assistant", box_to_text(box), action=written)
    wording = PROMPT_TEMPLATES[views.wording]
    text = (wording.report if report else wording.crop).format(question=question)
    return (*opening, region, Turn("user", text, (build_crop_view(study, folder, views, box),)))


@dataclass(frozen=True)
class ChainStep:
    """One step of a visual chain: what was asked, where was looked, what was answered (None: not yet)."""

    question: str
    box: Box
    written: bool  # the policy wrote the region itself
    answer: str | None = None
    report: bool = False  # a whole report is asked for


def chain_prompt(study: Study, folder: Path, views: PromptFormat, steps: Sequence[ChainStep]) -> Conversation:
    """The conversation of a chain. Only the last step's turns are actions: what came before is context."""
    conversation: Conversation = ()
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if position == 0:
            conversation = region_prompt(study, folder, views, step.question)
        else:
            conversation = (
                *conversation,
                Turn("user", PROMPT_TEMPLATES[views.wording].look.format(question=step.question)),
            )
        conversation = answer_prompt(
            conversation,
            study,
            folder,
            views,
            question=step.question,
            box=step.box,
            written=step.written and last,
            report=step.report,
        )
        if step.answer is not None:
            conversation = (*conversation, Turn("assistant", step.answer, action=last))
    return conversation


def with_answer(conversation: Conversation, answer: str) -> Conversation:
    """The conversation ended by an answer that counts in a loss."""
    return (*conversation, Turn("assistant", answer, action=True))


def judge_prompt(
    study: Study, folder: Path, views: PromptFormat, *, question: str, answer: str, box: Box
) -> Conversation:
    """What a judge is asked about a candidate: image, crop, question and proposed answer, nothing else."""
    text = PROMPT_TEMPLATES[views.wording].judge.format(question=question, answer=answer, region=box_to_text(box))
    pictures = (*build_whole_views(study, folder, views), build_crop_view(study, folder, views, box))
    return (Turn("user", text, pictures),)


def rating_prompt(conversation: Conversation) -> Conversation:
    """The conversation whose last turn asks for a rating instead of yes or no."""
    *before, last = conversation
    return (*before, replace(last, text=f"{last.text}\n{RATING_INSTRUCTION}"))


def finding_prompt(study: Study, folder: Path, views: PromptFormat, *, finding: str, box: Box) -> Conversation:
    """Does this region show the finding? (the question behind the sliding-window grounder)"""
    text = PROMPT_TEMPLATES[views.wording].finding.format(finding=finding)
    return (Turn("user", text, (build_crop_view(study, folder, views, box),)),)


def hash_prompt(views: PromptFormat, *, report: bool = False) -> str:
    """Names the wording and the sizes that a record was made with; `report`: an answer that is a whole report."""
    wording = PROMPT_TEMPLATES[views.wording]
    return hash_json([wording.digest, views.model_dump(mode="json"), *[wording.report] * report])[:20]


def collect_views(conversation: Sequence[Turn]) -> list[ImageView]:
    return [picture for turn in conversation for picture in turn.pictures]
