"""The picture of a record: its regions over the radiograph, and the crop as the policy saw it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from clincot.drawing import BLUE, GREEN, ORANGE, WHITE, Colour, Marked, Panel, picture
from clincot.errors import BadInput
from clincot.geometry import Box, box_to_text
from clincot.images import open_image, view
from clincot.prompts import Views, crop_picture, load_views
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
from clincot.runs import layout
from clincot.runs.lookup import RunRecords


class NoPicture(BadInput):
    """The record is of something that cannot be seen."""


class Illustrator:
    """Draws records of one run."""

    def __init__(self, records: RunRecords) -> None:
        self.records = records
        self.places = layout.policies(records.run)

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
