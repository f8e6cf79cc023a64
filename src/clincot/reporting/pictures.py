"""Picture of a record: its regions drawn on the radiograph, and the crop as the policy saw it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from clincot.drawing import BLUE, GREEN, ORANGE, WHITE, BoxAnnotation, ImagePanel, Rgb, render_panels
from clincot.errors import InvalidInput
from clincot.geometry import Box, Cutout, box_to_text
from clincot.images import open_image, render_view
from clincot.prompts import PromptFormat, build_crop_view, load_prompt_format
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


class NoPicture(InvalidInput):
    """The record is of a kind that has no picture."""


class Illustrator:
    """Draws the records of one run."""

    def __init__(self, records: RunRecords) -> None:
        self.records = records
        self.policies = layout.find_run_policies(records.run)  # {digest: checkpoint}

    def draw_record(self, record: Record) -> Image.Image:
        """Draw a record; raises NoPicture for a checkpoint, a decision or a report."""
        match record:
            case PreferencePair():
                return self._draw_pair(record)
            case Candidate():
                return render_panels([self._build_candidate_panel(record, BLUE, "")], self._read_title(record.question))
            case Judgement() | PanelScore():
                return self.draw_record(self.records.get_record(Candidate, record.candidate))
            case Region():
                views = self._find_prompt_format(next(iter(self.policies), ""))
                lines = _describe_region_lines(record)
                marks = [BoxAnnotation(record.box, BLUE)]
                panel = self._build_panel(
                    record.question, marks, record.id, lines, record.box, views, cutout=record.cutout
                )
                return render_panels([panel], self._read_title(record.question))
            case Outcome():
                return self._draw_outcome(record)
            case Reference():
                marks = [BoxAnnotation(box, WHITE, dashed=True) for box in record.boxes]
                panel = self._build_panel(record.question, marks, f"answer key: “{record.answer}”")
                return render_panels([panel], self._read_title(record.question))
            case Question():
                return render_panels([self._build_panel(record.id, [], record.id)], self._read_title(record.id))
            case Study():
                image = open_image(self.records.find_study_folder(record) / record.image)
                return render_panels([ImagePanel(image, (), record.image)], record.id)
        raise NoPicture(
            f"{record.id}: a {type(record).__name__} has no picture; pairs, candidates, regions, questions, studies "
            "and outcomes have one"
        )

    def _draw_pair(self, pair: PreferencePair) -> Image.Image:
        chosen = self.records.get_record(Candidate, pair.chosen)
        rejected = self.records.get_record(Candidate, pair.rejected)
        sides = [
            self._build_candidate_panel(chosen, BLUE, f"chosen at {pair.chosen_score:.2f}: "),
            self._build_candidate_panel(rejected, ORANGE, f"rejected at {pair.rejected_score:.2f}: "),
        ]
        return render_panels(sides, f"{self._read_title(pair.question)} (gap {pair.gap:.2f}, spread {pair.spread:.2f})")

    def _build_candidate_panel(self, candidate: Candidate, colour: Rgb, prefix: str) -> ImagePanel:
        region = self.records.get_record(Region, candidate.region)
        lines = list(_describe_region_lines(region))
        for score in self.records.find_by_candidate(PanelScore, candidate.id):
            value = "unscored" if score.score is None else f"{score.score:.2f} ± {score.spread:.2f}"
            lines.append(f"panel {value}, {score.judges} judges")
        caption = f"{prefix}“{candidate.text}”"
        views = self._find_prompt_format(candidate.policy)
        marks = [BoxAnnotation(region.box, colour)]
        return self._build_panel(candidate.question, marks, caption, lines, region.box, views, cutout=region.cutout)

    def _draw_outcome(self, outcome: Outcome) -> Image.Image:
        reference = self.records.get_record(Reference, outcome.reference)
        colour = {True: GREEN, False: ORANGE, None: WHITE}[outcome.correct]
        verdict = {True: "right", False: "wrong", None: "not scored"}[outcome.correct]
        marks = [
            *(BoxAnnotation(box, WHITE, dashed=True) for box in reference.boxes),
            BoxAnnotation(outcome.box, colour),
        ]
        lines = [
            f"looked at {box_to_text(outcome.box)} percent ({outcome.arm})",
            *([] if outcome.iou is None else [f"IoU {outcome.iou:.2f}"]),
            f"answer key (dashed): “{reference.answer}”",
        ]
        caption = f"“{outcome.answer}”: {verdict}"
        # The shuffled control showed this region of another patient's film, so this film has no such crop.
        box = None if outcome.arm == "shuffled" else outcome.box
        panel = self._build_panel(
            outcome.question, marks, caption, lines, box, self._find_prompt_format(outcome.policy)
        )
        return render_panels([panel], self._read_title(outcome.question))

    def _build_panel(
        self,
        question: str,
        marks: Sequence[BoxAnnotation],
        caption: str,
        lines: Sequence[str] = (),
        box: Box | None = None,
        views: PromptFormat | None = None,
        *,
        cutout: Cutout | None = None,
    ) -> ImagePanel:
        """Build a panel with the question's film and marks, and the crop of `box` as a policy sees it."""
        study = self.records.get_question_study(question)
        folder = self.records.find_study_folder(study)
        film = open_image(folder / study.image)
        crop = None
        if box is not None:
            view = build_crop_view(study, folder, views or PromptFormat(), box, cutout)
            crop = render_view(film, view.box, view.side_px, view.cutout)
        colour = marks[-1].colour if marks else WHITE
        return ImagePanel(film, tuple(marks), caption, tuple(lines), crop, colour)

    def _read_title(self, question: str) -> str:
        return self.records.get_record(Question, question).text

    def _find_prompt_format(self, policy: str) -> PromptFormat:
        checkpoint: Path | None = self.policies.get(policy)
        return load_prompt_format(checkpoint) if checkpoint is not None and checkpoint.is_dir() else PromptFormat()


def _describe_region_lines(region: Region) -> tuple[str, ...]:
    confidence = "" if region.grounder == "whole" else f", confidence {region.confidence:.2f}"
    return (f"{region.hypothesis}{confidence}", f"{box_to_text(region.box)} percent, by {region.grounder}")
