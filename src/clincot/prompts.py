"""Prompts: the images and texts that policies and judges receive. All prompt texts are in this module.

A visual chain of thought is one conversation:

    user       the whole image, the question
    assistant  the region to look at            written by the policy, or proposed by a grounder
    user       that region at full resolution
    assistant  the answer

A checkpoint is prompted with the wording and the image sizes that it was trained with (`PromptFormat`, stored with
the weights as clincot.json). A checkpoint without that file gets the defaults, whose wording is complete, and writes
regions in the form of its model family (REGION_FORMS).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from clincot.fields import FrozenModel
from clincot.geometry import (
    WHOLE_IMAGE,
    Box,
    Cutout,
    RegionForm,
    SmartResize,
    box_from_xyxy,
    crop_square,
    region_to_text,
)
from clincot.jsonl import InvalidRecord, format_validation_error
from clincot.records import Study, hash_json

PROMPT_FORMAT_FILE = "clincot.json"

# model_type (config.json) -> the form in which the family was trained to write regions; all others write percent.
REGION_FORMS: dict[str, RegionForm] = {
    # Coordinates normalised to [0, 1000): the authors in QwenLM/Qwen3-VL, issue 866, which quotes arXiv 2409.12191.
    # Fine-tuning data is round(x / width * 1000): convert_to_qwen2vl_format of its notebook
    # qwen-vl-finetune/tools/process_bbox.ipynb (read in repositories that copied the function).
    "qwen2_vl": "qwen2_box",
    # "absolute coordinates based on the actual input size of the image ... after processer": the authors in
    # QwenLM/Qwen3-VL, issue 676; written as {"bbox_2d": [x1, y1, x2, y2]}: cookbooks/spatial_understanding.ipynb.
    # Fine-tuning data is clipped to the last pixel: convert_to_qwen25vl_format of the notebook above.
    "qwen2_5_vl": "pixels",
    # "changed from the absolute coordinates used in Qwen2.5-VL to relative coordinates ranging from 0 to 1000":
    # QwenLM/Qwen3-VL, cookbooks/2d_grounding.ipynb (copy read: Firefly-llm/Qwen3-VL, commit d8cc2c17).
    "qwen3_vl": "thousand",
    "qwen3_vl_moe": "thousand",
    # Lists of four numbers, divided by 1000: OpenGVLab/InternVL, commit 0355722a,
    # internvl_chat/eval/refcoco/evaluate_grounding.py (PATTERN); the markers: commit a08ba330,
    # internvl_chat/internvl/train/constants.py (BOX_START_TOKEN), which training adds to the tokenizer.
    "internvl": "internvl_box",
    # round(box * 1023) as <locY1><locX1><locY2><locX2>: google-research/big_vision, commit 5f95305c,
    # big_vision/pp/proj/paligemma/segmentation.py; "detect {things}" prompts: commit 1475d53d,
    # big_vision/configs/proj/paligemma/README.md; transformers 5.19.0, models/paligemma/processing_paligemma.py
    # (EXTRA_TOKENS).
    "paligemma": "loc",
}

# How an image processor of Qwen's resizes if its file does not say: transformers 5.19.0,
# models/qwen2_vl/image_processing_qwen2_vl.py (Qwen2VLImageProcessor).
_QWEN_PROCESSOR = {"patch_size": 14, "merge_size": 2, "shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}


class PromptFormat(FrozenModel):
    """The wording and the image sizes that a checkpoint expects."""

    wording: Literal["full", "brief"] = "full"
    whole_grid: Annotated[int, Field(ge=1, le=8)] = 1  # the whole image is cut into whole_grid x whole_grid tiles
    whole_px: Annotated[int, Field(ge=16)] | None = None  # longest side of each tile; None: not resized
    crop_px: Annotated[int, Field(ge=16)] | None = None
    min_crop: Annotated[float, Field(gt=0, le=1)] = (
        0.25  # smallest side of a crop, as a share of the image's shorter side
    )
    region_form: RegionForm = "percent"  # how the policy writes a region
    resize: SmartResize | None = None  # how the processor resizes an image; for region_form "pixels" only

    @model_validator(mode="after")
    def _check_pixels(self) -> PromptFormat:
        if (self.region_form == "pixels") != (self.resize is not None):
            raise ValueError(
                f"region_form 'pixels' and resize belong together, got {self.region_form!r} and {self.resize}"
            )
        if self.resize is not None and self.whole_grid != 1:
            raise ValueError(
                f"region_form 'pixels' needs the whole image in one view (whole_grid 1), got {self.whole_grid}"
            )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what older formats do not have, so that their files and prompt digests keep their bytes."""
        fields: dict[str, Any] = serialize(self)
        if self.region_form == "percent":
            del fields["region_form"]
        if self.resize is None:
            del fields["resize"]
        return fields


@dataclass(frozen=True)
class ImageView:
    """An image or a crop of it, at the size that a model sees. The file is read only when a model needs it."""

    path: str
    sha256: str  # of the image file
    box: Box | None = None  # None: the whole image
    side_px: int | None = None
    cutout: Cutout | None = None  # what is shown outside a mask; None: everything

    @cached_property
    def key(self) -> str:
        """Identifies the content of the view, independent of the file's path."""
        box = "" if self.box is None else ",".join(f"{v:.4f}" for v in self.box.xyxy)
        cut = "" if self.cutout is None else f":{hash_json(self.cutout.model_dump(mode='json'))[:20]}"
        return f"{self.sha256}:{box}:{self.side_px}{cut}"


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
    """The texts around a question, with the placeholders {question}, {answer}, {region} and {finding}.

    detect: replaces `look` where the policy is asked for a region, if the family has a prompt of its own for that.
    """

    look: str
    crop: str
    report: str  # replaces `crop` if the answer is a whole report
    judge: str
    finding: str
    detect: str = ""

    @property
    def digest(self) -> str:
        """Identifies the wording in record ids. `report` is left out, so that older ids keep their value."""
        texts = [self.look, self.crop, self.judge, self.finding, *[self.detect] * bool(self.detect)]
        return hash_json(texts)[:20]


def _build_full_template(look: str, judge: str, *, detect: str = "") -> PromptTemplate:
    """The complete wording, with the sentences of one region form: how to write a region, how to read one."""
    return PromptTemplate(
        look="{question}" + look,
        crop="This is that region at full resolution. Answer the question in a few words: {question}",
        report="This is that region at full resolution. {question} Write a report of the whole image in a few "
        "sentences: what is seen, on which side, and what is not.",
        judge="The second image is the region {region} of the first" + judge + " at full resolution.\n"
        "Question: {question}\nProposed answer: {answer}\nIs the proposed answer right? Answer yes or no.",
        finding="Does this region of a medical image show {finding}? Answer yes or no.",
        detect=detect,
    )


_NAME_REGION = "\nFirst name the region of the image to look at, as "
_THOUSAND = "with coordinates from 0 to 1000"

# The complete wording in each region form.
FULL_TEMPLATES: dict[RegionForm, PromptTemplate] = {
    "percent": _build_full_template(
        _NAME_REGION + "[x0, y0, x1, y1] in percent of its width and height.", " (percent of its width and height)"
    ),
    "pixels": _build_full_template(_NAME_REGION + "[x1, y1, x2, y2] in pixels.", " (pixels)"),
    "thousand": _build_full_template(f"{_NAME_REGION}[x1, y1, x2, y2] {_THOUSAND}.", f" ({_THOUSAND})"),
    # the markers of these two are tokens, which the policy knows; a question could only spell them out
    "qwen2_box": _build_full_template(f"{_NAME_REGION}a bounding box (x1,y1),(x2,y2) {_THOUSAND}.", f" ({_THOUSAND})"),
    "internvl_box": _build_full_template(
        f"{_NAME_REGION}a bounding box [[x1, y1, x2, y2]] {_THOUSAND}.", f" ({_THOUSAND})"
    ),
    "loc": _build_full_template("", "", detect="detect {finding}"),
}

PROMPT_TEMPLATES: dict[str, PromptTemplate] = {
    "full": FULL_TEMPLATES["percent"],
    # For the tiny models, which are trained with it: every further word would cost a token per question.
    "brief": PromptTemplate(
        look="{question}", crop="", report="", judge="{region} {question} {answer}?", finding="Is there {finding}?"
    ),
}


# Put before the first turn of a question about several images; the regions are those of the first.
OTHER_IMAGES = "The first image is the one to look at; further images follow it, in this order: {roles}."

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


def get_template(views: PromptFormat) -> PromptTemplate:
    """The texts of a format's wording, with the sentences of its region form."""
    return FULL_TEMPLATES[views.region_form] if views.wording == "full" else PROMPT_TEMPLATES[views.wording]


def load_prompt_format(checkpoint: Path) -> PromptFormat:
    """Load the PromptFormat of a checkpoint folder.

    Without clincot.json, the defaults with the region form of the checkpoint's family. Raises InvalidRecord.
    """
    path = checkpoint / PROMPT_FORMAT_FILE
    if not path.is_file():
        path = checkpoint / "config.json"
        model_type = _read_object(path).get("model_type")
        fields: dict[str, Any] = {"region_form": REGION_FORMS.get(str(model_type), "percent")}
    else:
        fields = _read_object(path)
    if fields.get("region_form") == "pixels" and "resize" not in fields:
        fields["resize"] = _read_resize(checkpoint)
    try:
        return PromptFormat.model_validate(fields)
    except ValidationError as error:
        raise InvalidRecord(f"{path}: not a prompt format: {format_validation_error(error)}") from None


def build_prompt_format(model_type: str, resize: SmartResize | None = None) -> PromptFormat:
    """The PromptFormat of a family's checkpoint without clincot.json.

    resize: how its image processor resizes, for families that write regions in pixels.
    """
    form = REGION_FORMS.get(model_type, "percent")
    return PromptFormat(region_form=form, resize=resize if form == "pixels" else None)


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; {} if the file does not exist. Raises InvalidRecord."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InvalidRecord(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(value, dict):
        raise InvalidRecord(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_resize(checkpoint: Path) -> dict[str, int]:
    """Read how the checkpoint's image processor resizes, as SmartResize's fields.

    transformers 5 writes the image processor into processor_config.json and prefers it to preprocessor_config.json,
    the only file of older checkpoints. min_pixels and max_pixels are the older names of the limits and win over `size`.
    """
    processor = _read_object(checkpoint / "processor_config.json").get("image_processor")
    if not isinstance(processor, dict):
        processor = _read_object(checkpoint / "preprocessor_config.json")
    limits = processor.get("size")
    limits = limits if isinstance(limits, dict) else {}
    shortest = processor.get("min_pixels") or limits.get("shortest_edge") or _QWEN_PROCESSOR["shortest_edge"]
    longest = processor.get("max_pixels") or limits.get("longest_edge") or _QWEN_PROCESSOR["longest_edge"]
    patch = processor.get("patch_size") or _QWEN_PROCESSOR["patch_size"]
    merge = processor.get("merge_size") or _QWEN_PROCESSOR["merge_size"]
    return {"factor": patch * merge, "min_pixels": shortest, "max_pixels": longest}


def save_prompt_format(checkpoint: Path, views: PromptFormat) -> None:
    """Write the PromptFormat into a checkpoint folder."""
    (checkpoint / PROMPT_FORMAT_FILE).write_text(views.model_dump_json(indent=2) + "\n", encoding="utf-8")


def build_whole_views(study: Study, folder: Path, views: PromptFormat) -> tuple[ImageView, ...]:
    """Build the views of the whole image: one view, or a grid of tiles in reading order."""
    path, n = _join_path(folder, study.image), views.whole_grid
    if n == 1:
        return (ImageView(path, study.sha256, None, views.whole_px),)
    tiles = []
    for row, column in product(range(n), repeat=2):
        box = box_from_xyxy((column / n, row / n, (column + 1) / n, (row + 1) / n))
        tiles.append(ImageView(path, study.sha256, box, views.whole_px))
    return tuple(tiles)


def build_crop_view(
    study: Study, folder: Path, views: PromptFormat, box: Box, cutout: Cutout | None = None
) -> ImageView:
    """Build the view of a region: its square crop (geometry.crop_square) at the checkpoint's crop size.

    cutout: what the crop shows outside the region's mask.
    """
    shown = box if box == WHOLE_IMAGE else crop_square(box, min_side=views.min_crop, aspect=study.width / study.height)
    return ImageView(_join_path(folder, study.image), study.sha256, shown, views.crop_px, cutout)


@lru_cache(maxsize=256)  # dozens of windows of one image follow each other
def _join_path(folder: Path, image: str) -> str:
    return str(folder / image)


def compute_region_size(study: Study, views: PromptFormat) -> tuple[int, int]:
    """(width, height) in pixels of the whole image as the model receives it: the unit of region_form "pixels"."""
    width, height = study.width, study.height
    if views.whole_px is not None:  # as images.render_view resizes
        longest = max(width, height)
        width, height = (max(1, round(length * views.whole_px / longest)) for length in (width, height))
    return (width, height) if views.resize is None else views.resize.compute_size(width, height)


def format_region(box: Box, study: Study, views: PromptFormat) -> str:
    """Format a region of a study's image as the policy writes it."""
    return region_to_text(box, views.region_form, compute_region_size(study, views))


def add_context_images(
    conversation: Conversation, others: Sequence[tuple[Study, str]], folder: Path, views: PromptFormat
) -> Conversation:
    """Show further images, given with their roles, after the image of the first turn; its text names their roles."""
    if not others:
        return conversation
    first, *rest = conversation
    pictures = list(first.pictures)
    for study, _ in others:
        pictures += build_whole_views(study, folder, views)
    text = OTHER_IMAGES.format(roles=", ".join(role for _, role in others))
    return (replace(first, text=f"{text}\n{first.text}", pictures=tuple(pictures)), *rest)


def region_prompt(study: Study, folder: Path, views: PromptFormat, question: str, *, finding: str = "") -> Conversation:
    """Build the first turn: the whole image and the question. The policy replies with a region.

    finding: what to look for, for families whose prompt names only that ("detect nodule"). Without it, the turn is
    the opening of a chain whose region is known.
    """
    wording = get_template(views)
    if wording.detect and finding:
        text = wording.detect.format(finding=finding)
    else:
        text = wording.look.format(question=question)
    return (Turn("user", text, build_whole_views(study, folder, views)),)


@dataclass(frozen=True)
class ChainStep:
    """One step of a visual chain: question, region, and answer (None: not answered yet)."""

    question: str
    box: Box
    written: bool  # the policy wrote the region itself
    answer: str | None = None
    report: bool = False  # the answer is a whole report
    cutout: Cutout | None = None  # of a region with a mask


def answer_prompt(
    opening: Conversation, study: Study, folder: Path, views: PromptFormat, step: ChainStep
) -> Conversation:
    """Append the region of `step` and its crop to `opening`. The policy replies with an answer."""
    region = Turn("assistant", format_region(step.box, study, views), action=step.written)
    wording = get_template(views)
    text = (wording.report if step.report else wording.crop).format(question=step.question)
    return (*opening, region, Turn("user", text, (build_crop_view(study, folder, views, step.box, step.cutout),)))


def chain_prompt(study: Study, folder: Path, views: PromptFormat, steps: Sequence[ChainStep]) -> Conversation:
    """Build the conversation of a chain. Only turns of the last step are actions; earlier steps are context."""
    conversation: Conversation = ()
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if position == 0:
            conversation = region_prompt(study, folder, views, step.question)
        else:
            text = get_template(views).look.format(question=step.question)
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
    study: Study,
    folder: Path,
    views: PromptFormat,
    *,
    question: str,
    answer: str,
    box: Box,
    cutout: Cutout | None = None,
) -> Conversation:
    """Build the prompt that asks a judge about a candidate: image, crop, question and proposed answer only."""
    region = format_region(box, study, views)
    text = get_template(views).judge.format(question=question, answer=answer, region=region)
    images = (*build_whole_views(study, folder, views), build_crop_view(study, folder, views, box, cutout))
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
    text = get_template(views).finding.format(finding=finding)
    return (Turn("user", text, (build_crop_view(study, folder, views, box),)),)


def fill_segmenter_prompt(template: str, finding: str, study: Study) -> str:
    """The text for a segmentation model: {finding} and {modality} filled in, such as "nodule in chest x-ray"."""
    return template.replace("{finding}", finding).replace("{modality}", study.modality or "medical image")


def hash_prompt(views: PromptFormat, *, report: bool = False) -> str:
    """Identify the wording and the image sizes of a prompt. report: the answer is a whole report."""
    wording = get_template(views)
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
