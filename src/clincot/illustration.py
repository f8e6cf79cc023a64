"""The picture of a record: its regions over the radiograph, and the crop as the policy saw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clincot import run_folder
from clincot.conversation import Views, crop_picture, load_views
from clincot.errors import BadInput
from clincot.geometry import Box, box_to_pixels, box_to_text
from clincot.images import open_image, view
from clincot.records import (
    Candidate,
    Judgement,
    Outcome,
    PanelScore,
    PreferencePair,
    Question,
    Record,
    Reference,
    Region,
    Study,
)
from clincot.run_records import RunRecords

SIDE_PX = 480  # the longer side of a film in a picture
CROP_PX = 220
# told apart by every kind of colour vision
BLUE, ORANGE, GREEN, WHITE = (98, 195, 255), (255, 162, 58), (61, 220, 151), (255, 255, 255)
_INK, _PAPER, _SOFT = (28, 33, 39), (251, 251, 249), (89, 98, 109)
_PAD, _LINE_PX, _CAPTION_PX, _TEXT_PX = 14, 3, 17, 14

Colour = tuple[int, int, int]


class NoPicture(BadInput):
    """The record is of something that cannot be seen."""


class Illustrator:
    """Draws records of one run."""

    def __init__(self, records: RunRecords) -> None:
        self.records = records
        self.places = run_folder.policies(records.run)

    def draw(self, record: Record) -> Image.Image:
        """Raises NoPicture for a checkpoint, a decision or a report."""
        match record:
            case PreferencePair():
                return self._pair(record)
            case Candidate():
                return picture([self._candidate(record, BLUE, "")], self._title(record.question))
            case Judgement() | PanelScore():
                return self.draw(self.records.get(Candidate, record.candidate))
            case Region():
                views = self._views(next(iter(self.places), ""))
                lines = _place(record)
                panel = self._panel(record.question, [Marked(record.box, BLUE)], record.id, lines, record.box, views)
                return picture([panel], self._title(record.question))
            case Outcome():
                return self._outcome(record)
            case Reference():
                marks = [Marked(box, WHITE, dashed=True) for box in record.boxes]
                panel = self._panel(record.question, marks, f"answer key: “{record.answer}”")
                return picture([panel], self._title(record.question))
            case Question():
                return picture([self._panel(record.id, [], record.id)], self._title(record.id))
            case Study():
                film = open_image(self.records.folder_of(record) / record.image)
                return picture([Panel(film, (), record.image)], record.id)
        raise NoPicture(
            f"{record.id}: a {type(record).__name__} has no picture; pairs, candidates, regions, questions, studies "
            "and outcomes have one"
        )

    def _pair(self, pair: PreferencePair) -> Image.Image:
        sides = [
            self._candidate(self.records.get(Candidate, one), colour, f"{name} at {score:.2f}: ")
            for name, one, score, colour in (
                ("chosen", pair.chosen, pair.chosen_score, BLUE),
                ("rejected", pair.rejected, pair.rejected_score, ORANGE),
            )
        ]
        return picture(sides, f"{self._title(pair.question)} (gap {pair.gap:.2f}, spread {pair.spread:.2f})")

    def _candidate(self, candidate: Candidate, colour: Colour, before: str) -> Panel:
        region = self.records.get(Region, candidate.region)
        lines = list(_place(region))
        for score in self.records.of_candidate(PanelScore, candidate.id):
            given = "unscored" if score.score is None else f"{score.score:.2f} ± {score.spread:.2f}"
            lines.append(f"panel {given}, {score.judges} judges")
        caption = f"{before}“{candidate.text}”"
        views = self._views(candidate.policy)
        return self._panel(candidate.question, [Marked(region.box, colour)], caption, lines, region.box, views)

    def _outcome(self, outcome: Outcome) -> Image.Image:
        reference = self.records.get(Reference, outcome.reference)
        colour = {True: GREEN, False: ORANGE, None: WHITE}[outcome.correct]
        verdict = {True: "right", False: "wrong", None: "not scored"}[outcome.correct]
        marks = [*(Marked(box, WHITE, dashed=True) for box in reference.boxes), Marked(outcome.box, colour)]
        lines = [
            f"looked at {box_to_text(outcome.box)} percent ({outcome.arm})",
            *([] if outcome.iou is None else [f"IoU {outcome.iou:.2f}"]),
            f"answer key (dashed): “{reference.answer}”",
        ]
        caption = f"“{outcome.answer}”: {verdict}"
        # the shuffled control looked at that place on another patient's film: this question's has no such crop
        box = None if outcome.arm == "shuffled" else outcome.box
        panel = self._panel(outcome.question, marks, caption, lines, box, self._views(outcome.policy))
        return picture([panel], self._title(outcome.question))

    def _panel(
        self,
        question: str,
        marks: Sequence[Marked],
        caption: str,
        lines: Sequence[str] = (),
        box: Box | None = None,
        views: Views | None = None,
    ) -> Panel:
        """The question's film with marks; with a box, the crop of it at the size at which a policy sees it."""
        study = self.records.study_of(question)
        folder = self.records.folder_of(study)
        film = open_image(folder / study.image)
        crop = None
        if box is not None:
            seen = crop_picture(study, folder, views or Views(), box)
            crop = view(film, seen.box, seen.side_px)
        colour = marks[-1].colour if marks else WHITE
        return Panel(film, tuple(marks), caption, tuple(lines), crop, colour)

    def _title(self, question: str) -> str:
        return self.records.get(Question, question).text

    def _views(self, policy: str) -> Views:
        place: Path | None = self.places.get(policy)
        return load_views(place) if place is not None and place.is_dir() else Views()


def _place(region: Region) -> tuple[str, ...]:
    sure = "" if region.grounder == "whole" else f", confidence {region.confidence:.2f}"
    return (f"{region.hypothesis}{sure}", f"{box_to_text(region.box)} percent, by {region.grounder}")


@dataclass(frozen=True)
class Marked:
    """A box to draw on a film."""

    box: Box
    colour: Colour
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One film with its boxes, the crop that a model saw of it (if any), a caption and lines of text."""

    film: Image.Image
    boxes: tuple[Marked, ...]
    caption: str
    lines: tuple[str, ...] = ()
    crop: Image.Image | None = None
    colour: Colour = _SOFT


def picture(panels: Sequence[Panel], title: str) -> Image.Image:
    """The panels side by side under a title, on light paper. Pillow's own font: the same picture everywhere."""
    drawn = [_drawn(panel) for panel in panels]
    width = sum(image.width for image in drawn) + _PAD * (len(drawn) + 1)
    lines = _wrapped(title, width - 2 * _PAD, _CAPTION_PX)
    top = _PAD + len(lines) * _leading(_CAPTION_PX) + _PAD // 2
    whole = Image.new("RGB", (width, top + max(image.height for image in drawn) + _PAD), _PAPER)
    _write(whole, lines, (_PAD, _PAD), _CAPTION_PX, _INK)
    left = _PAD
    for image in drawn:
        whole.paste(image, (left, top))
        left += image.width + _PAD
    return whole


def _drawn(panel: Panel) -> Image.Image:
    """A panel on paper: caption, film, then the crop with the lines beside it."""
    film = _with_boxes(view(panel.film, None, SIDE_PX), panel.boxes)
    width = max(film.width, SIDE_PX)
    caption = _wrapped(panel.caption, width, _CAPTION_PX)
    head = 6 + len(caption) * _leading(_CAPTION_PX) + 6
    crop = None if panel.crop is None else view(panel.crop, None, CROP_PX)
    text_left = 0 if crop is None else crop.width + _PAD
    lines = [part for line in panel.lines for part in _wrapped(line, width - text_left, _TEXT_PX)]
    foot = max(0 if crop is None else crop.height, len(lines) * _leading(_TEXT_PX))
    whole = Image.new("RGB", (width, head + film.height + _PAD + foot), _PAPER)
    ImageDraw.Draw(whole).rectangle((0, 0, width - 1, 3), fill=panel.colour)
    _write(whole, caption, (0, 8), _CAPTION_PX, _INK)
    whole.paste(film, (0, head))
    if crop is not None:
        whole.paste(crop, (0, head + film.height + _PAD))
    _write(whole, lines, (text_left, head + film.height + _PAD), _TEXT_PX, _SOFT)
    return whole


def _with_boxes(film: Image.Image, boxes: Sequence[Marked]) -> Image.Image:
    draw = ImageDraw.Draw(film)
    for marked in boxes:
        x0, y0, x1, y1 = box_to_pixels(marked.box, width=film.width, height=film.height)
        if not marked.dashed:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=marked.colour, width=_LINE_PX)
            continue
        for start in range(x0, x1, 12):
            end = min(start + 7, x1 - 1)
            draw.line((start, y0 + 1, end, y0 + 1), fill=marked.colour, width=_LINE_PX)
            draw.line((start, y1 - 2, end, y1 - 2), fill=marked.colour, width=_LINE_PX)
        for start in range(y0, y1, 12):
            end = min(start + 7, y1 - 1)
            draw.line((x0 + 1, start, x0 + 1, end), fill=marked.colour, width=_LINE_PX)
            draw.line((x1 - 2, start, x1 - 2, end), fill=marked.colour, width=_LINE_PX)
    return film


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words; a longer word has a line of its own."""
    font, lines = ImageFont.load_default(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(image: Image.Image, lines: Sequence[str], at: tuple[int, int], size: int, colour: Colour) -> None:
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * _leading(size)), line, fill=colour, font=font)


def _leading(size: int) -> int:
    return round(size * 1.4)
