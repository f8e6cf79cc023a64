"""Lineage of a record: a tree from any id in a run folder to everything it comes from (`clincot show`).

pair -> candidates -> regions -> question -> study -> image file
        with the judgements of each candidate, the policy that answered, and the configuration
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from clincot.config import load_params
from clincot.errors import InvalidInput
from clincot.evaluation.answer_protocols import choose_headline
from clincot.evaluation.benchmark_report import METRIC_HEADINGS
from clincot.geometry import box_to_text
from clincot.jsonl import hash_files, read_json
from clincot.records import (
    BenchmarkReport,
    Candidate,
    Checkpoint,
    DataVersion,
    Decision,
    Interval,
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
from clincot.reporting.pictures import Illustrator
from clincot.runs import layout
from clincot.runs.lookup import RunRecords
from clincot.text import format_count, format_interval

_MAX_LISTED = 20  # records that a message lists
_DATA_STAGES = ("propose", "answer", "judge", "pair")  # the stages whose configuration a pair depends on


class RecordNotFound(InvalidInput):
    """No record of the run has an id that begins with the given text."""


class AmbiguousId(InvalidInput):
    """Several records have an id that begins with the given text; the message lists them."""


@dataclass
class LineageNode:
    """A line of the tree with the nodes below it."""

    text: str
    below: list[LineageNode] = field(default_factory=list)


def find_record(run_dir: Path, prefix: str) -> Record:
    """Find the record whose id begins with `prefix`.

    The hash of an id without its kind, and the sha256 of an image or a checkpoint, work as well. Raises RecordNotFound,
    AmbiguousId, and InvalidRecord if the folder is not a run.
    """
    prefix = prefix.strip()
    matches: dict[str, Record] = {}
    for record in RunRecords(run_dir).find_by_prefix(prefix) if prefix else ():
        if record.id == prefix:
            return record
        matches[record.id] = record
        if len(matches) > _MAX_LISTED:
            break
    if not matches:
        raise RecordNotFound(
            f"no record in {run_dir} begins with {prefix!r}; expected an id such as pair-1a2b, as shown on the page "
            "and in the run's .jsonl files"
        )
    if len(matches) > 1:
        listed = [f"  {record.id}  {_summarise_record(record)}" for record in matches.values()][:_MAX_LISTED]
        more = ["  and more"] if len(matches) > _MAX_LISTED else []
        raise AmbiguousId("\n".join([f"{prefix!r} is the beginning of several ids:", *listed, *more]))
    return next(iter(matches.values()))


def render_lineage(run_dir: Path, record: Record) -> str:
    """Render a record and everything it comes from as a text tree; raises InvalidRecord if a link is broken."""
    return "\n".join(_render_lines(_LineageTree(RunRecords(run_dir)).build_node(record)))


def draw_record(run_dir: Path, record: Record) -> Image.Image:
    """Draw a record's region on its radiograph, with the crop that the policy saw; for a pair, both sides.

    Raises NoPicture for a kind of record without a picture (checkpoint, decision, report), InvalidImage for an
    unreadable image file.
    """
    return Illustrator(RunRecords(run_dir)).draw_record(record)


def _render_lines(node: LineageNode) -> Iterator[str]:
    """Yield the lines of a node and, indented, of the nodes below it."""
    yield node.text
    for number, below in enumerate(node.below, start=1):
        last = number == len(node.below)
        first, *others = _render_lines(below)
        yield ("└─ " if last else "├─ ") + first
        yield from (("   " if last else "│  ") + line for line in others)


class _LineageTree:
    """Builds the tree of a record, with one method for each kind of record."""

    def __init__(self, records: RunRecords) -> None:
        self.records, self.run = records, records.run

    def build_node(self, record: Record) -> LineageNode:
        """Build the tree of any record; raises RecordNotFound for a kind without a lineage."""
        builders: dict[type[Record], Callable[[Any], LineageNode]] = {
            PreferencePair: self.build_pair,
            Candidate: self.build_candidate,
            Region: self.build_region,
            Question: self.build_question,
            Study: self.build_study,
            Judgement: partial(self.build_judgement, candidate=True),
            PanelScore: self.build_score,
            Outcome: self.build_outcome,
            Reference: self.build_reference,
            Checkpoint: self.build_checkpoint,
            DataVersion: _build_version_node,
            Decision: self.build_decision,
            BenchmarkReport: self.build_report,
        }
        if type(record) not in builders:
            raise RecordNotFound(f"{record.id}: expected a record with a lineage, got a {type(record).__name__}")
        return builders[type(record)](record)

    def build_pair(self, pair: PreferencePair) -> LineageNode:
        _, path = self.records.locate_record(PreferencePair, pair.id)
        below = [
            LineageNode(
                f"gap {pair.gap:.3f} = {pair.chosen_score:.3f} − {pair.rejected_score:.3f}, "
                f"judges' spread {pair.spread:.3f}" + (f", step {pair.step + 1}" if pair.step else "")
            ),
            self.find_question(pair.question),
        ]
        for name, score, candidate_id in (
            ("chosen", pair.chosen_score, pair.chosen),
            ("rejected", pair.rejected_score, pair.rejected),
        ):
            side = self.build_candidate(self.records.get_record(Candidate, candidate_id), question=False)
            below.append(LineageNode(f"{name} at {score:.3f}: {side.text}", side.below))
        digest = hash_files(path)
        for folder, checkpoint in layout.iter_checkpoints(self.run):
            if checkpoint.pairs == digest:
                below.append(LineageNode(f"trained {checkpoint.id}  {self._shorten_path(folder)}"))
        below.append(self.build_configuration())
        return LineageNode(f"{pair.id}  preference pair  {self._shorten_path(path)}", below)

    def build_candidate(self, candidate: Candidate, *, question: bool = True) -> LineageNode:
        below = [self.find_question(candidate.question)] if question else []
        below.append(self.build_region(self.records.get_record(Region, candidate.region), question=False))
        judgements = [self.build_judgement(j) for j in self.records.find_by_candidate(Judgement, candidate.id)]
        scores = self.records.find_by_candidate(PanelScore, candidate.id)
        below += [LineageNode(_describe_score(score), judgements) for score in scores] or judgements
        below.append(self.build_policy("answered by policy", candidate.policy))
        below.append(
            LineageNode(
                f"prompt {candidate.prompt}, temperature {candidate.temperature:g}, seed {candidate.seed}, "
                f"log-probability {sum(candidate.token_logprobs):.3f} nats in {len(candidate.token_logprobs)} tokens"
            )
        )
        if candidate.parent:
            parent = self.build_candidate(self.records.get_record(Candidate, candidate.parent), question=False)
            below.append(LineageNode(f"continues {parent.text}", parent.below))
        step = f" (step {candidate.step + 1})" if candidate.step or candidate.parent else ""
        return LineageNode(f"{candidate.id}  “{candidate.text}”{step}", below)

    def build_region(self, region: Region, *, question: bool = True) -> LineageNode:
        return LineageNode(_describe_region(region), [self.find_question(region.question)] if question else [])

    def find_question(self, question_id: str) -> LineageNode:
        return self.build_question(self.records.get_record(Question, question_id))

    def build_question(self, question: Question) -> LineageNode:
        topic = f", {question.topic}" if question.topic else ""
        study = self.build_study(self.records.get_record(Study, question.study))
        return LineageNode(f"{question.id}  “{question.text}” ({question.kind}{topic})", [study])

    def build_study(self, study: Study) -> LineageNode:
        folder = self.records.find_study_folder(study)
        path = folder / study.image
        if not path.is_file():
            state = "MISSING"
        else:
            state = "as recorded" if hash_files(path) == study.sha256 else "CHANGED since it was recorded"
        about = ", ".join(part for part in (study.modality, study.patient and f"patient {study.patient}") if part)
        return LineageNode(
            f"{study.id}  {study.width} × {study.height} px" + (f", {about}" if about else ""),
            [LineageNode(f"{path}  {state}"), LineageNode(f"sha256 {study.sha256}")],
        )

    def build_judgement(self, judgement: Judgement, *, candidate: bool = False) -> LineageNode:
        score = f"unscored: {judgement.reason}" if judgement.score is None else f"{judgement.score:.3f}"
        below = [LineageNode(f"judge {judgement.judge}, prompt {judgement.prompt}")]
        if candidate:
            below.append(self.build_candidate(self.records.get_record(Candidate, judgement.candidate)))
        return LineageNode(f"{judgement.id}  {self._find_judge_name(judgement)} {score}", below)

    def build_score(self, score: PanelScore) -> LineageNode:
        candidate = self.records.get_record(Candidate, score.candidate)
        return LineageNode(_describe_score(score), [self.build_candidate(candidate)])

    def build_reference(self, reference: Reference) -> LineageNode:
        return LineageNode(_describe_reference(reference), [self.find_question(reference.question)])

    def build_outcome(self, outcome: Outcome) -> LineageNode:
        reference = self.records.get_record(Reference, outcome.reference)
        below = [
            self.find_question(outcome.question),
            LineageNode(_describe_reference(reference)),
            LineageNode(f"looked at {box_to_text(outcome.box)} percent ({outcome.arm}){_describe_hit(outcome)}"),
            self.build_policy("answered by policy", outcome.policy),
        ]
        verdict = {True: "right", False: "wrong", None: "could not be scored"}[outcome.correct]
        return LineageNode(f"{outcome.id}  “{outcome.answer}” {verdict}", below)

    def build_checkpoint(self, checkpoint: Checkpoint) -> LineageNode:
        known = self.records.find_checkpoint(checkpoint.sha256)
        folder = Path(checkpoint.uri) if known is None else known[1]
        below = [LineageNode(f"sha256 {checkpoint.sha256}")]
        if checkpoint.parent:
            below.append(self.build_policy("trained from policy", checkpoint.parent))
        for path, kind in self.records.files:
            if kind is PreferencePair and checkpoint.pairs == hash_files(path):
                below.append(LineageNode(f"pairs {self._shorten_path(path)}  sha256 {checkpoint.pairs}"))
        if checkpoint.data_revision:
            below.append(LineageNode(f"kept at revision {checkpoint.data_revision} of the data repository"))
        train = load_params(self.run / layout.PARAMS_FILE).train.digest
        same = checkpoint.config == train
        origin = "params.yaml's" if same else "not params.yaml's: a comparison's, or it was changed"
        below.append(LineageNode(f"train section {checkpoint.config} ({origin})"))
        if (log := folder / layout.TRAIN_LOG_FILE).is_file() and (entries := read_json(log)):
            below.append(LineageNode(f"last of {len(entries)} logged steps: {json.dumps(entries[-1], sort_keys=True)}"))
        return LineageNode(f"{checkpoint.id}  checkpoint  {self._shorten_path(folder)}", below)

    def build_decision(self, decision: Decision) -> LineageNode:
        below = [
            LineageNode(f"{decision.metric}: challenger − champion {_describe_interval(decision.difference)}"),
            *(LineageNode(reason) for reason in decision.reasons),
            self.build_policy("champion", decision.champion),
            self.build_policy("challenger", decision.challenger),
            LineageNode(f"benchmark {decision.benchmark}"),
        ]
        return LineageNode(f"{decision.id}  {decision.verdict}", below)

    def build_report(self, report: BenchmarkReport) -> LineageNode:
        protocol = load_params(self.run / layout.PARAMS_FILE).decide.protocol
        arms = []
        for arm, metrics in report.metrics.items():
            headline = choose_headline(protocol, metrics)
            shown = dict.fromkeys((headline, "accuracy"))  # by the recipe's protocol first, exact match second
            described = [
                f"{METRIC_HEADINGS[name] if protocol != 'strict' else name} {_describe_interval(metrics[name])}"
                for name in shown
                if name in metrics
            ]
            if described:
                arms.append(LineageNode(f"{arm}: {', '.join(described)}"))
        below = [*arms, self.build_policy("policy", report.policy), LineageNode(f"benchmark {report.benchmark}")]
        return LineageNode(f"{report.id}  report, {report.protocol}", below)

    def build_policy(self, role: str, digest: str) -> LineageNode:
        known = self.records.find_checkpoint(digest)
        if known is not None:
            return LineageNode(f"{role} {digest}  {self._shorten_path(known[1])}, {known[0].id}")
        base = layout.find_run_policies(self.run).get(digest)
        return LineageNode(f"{role} {digest}  " + ("not one of this run's" if base is None else f"the base, {base}"))

    def build_configuration(self) -> LineageNode:
        params = load_params(self.run / layout.PARAMS_FILE)
        sections = [LineageNode(f"{name} {getattr(params, name).digest}") for name in _DATA_STAGES]
        return LineageNode(f"configuration {self._shorten_path(self.run / layout.PARAMS_FILE)}", sections)

    def _find_judge_name(self, judgement: Judgement) -> str:
        names: dict[str, str] = {}
        for folder in layout.list_round_folders(self.run):
            names |= layout.read_judge_names(folder)
        return names.get(judgement.judge, "a judge that no panel report names")

    def _shorten_path(self, path: Path) -> str:
        return str(path.relative_to(self.run)) if path.is_relative_to(self.run) else str(path)


def _summarise_record(record: Record) -> str:
    """Summarise a record in a few words, for a list."""
    match record:
        case PreferencePair():
            return f"gap {record.gap:.3f}"
        case Candidate() | Question():
            return f"“{record.text}”"
        case Region():
            return _describe_region(record).partition("  ")[2]
        case Judgement() | PanelScore():
            return "unscored" if record.score is None else f"{record.score:.3f}"
        case Outcome():
            return f"“{record.answer}” ({record.arm})"
        case Study():
            return record.image
        case Decision():
            return record.verdict
        case Reference():
            return record.answer
    return type(record).__name__


def _build_version_node(version: DataVersion) -> LineageNode:
    where = f"{version.tag} of {version.repository}, revision {version.revision}"
    below = [
        LineageNode(where if version.revision else f"not versioned: {version.unversioned}"),
        LineageNode(f"sha256 {version.sha256}, {version.size} bytes"),
        *(LineageNode(f"{file.name}  sha256 {file.sha256}") for file in version.files),
    ]
    return LineageNode(
        f"{version.id}  preference data: {version.pairs} pairs of {version.candidates} candidates", below
    )


def _describe_region(region: Region) -> str:
    confidence = "" if region.grounder == "whole" else f", confidence {region.confidence:.3f}"
    return f"{region.id}  {region.hypothesis} at {box_to_text(region.box)} percent, by {region.grounder}{confidence}"


def _describe_score(score: PanelScore) -> str:
    value = f"unscored: {score.reason}" if score.score is None else f"{score.score:.3f} ± {score.spread:.3f}"
    return f"{score.id}  panel {value}, {format_count(score.judges, 'judge')}"


def _describe_reference(reference: Reference) -> str:
    boxes = ", ".join(box_to_text(box) for box in reference.boxes)
    where = f"seen at {boxes}" if boxes else "without a box"
    return f"{reference.id}  answer key: “{reference.answer}”, {where}"


def _describe_hit(outcome: Outcome) -> str:
    hit = "" if outcome.hit is None else (", a hit" if outcome.hit else ", a miss")
    return hit + ("" if outcome.iou is None else f", IoU {outcome.iou:.3f}") + (", off format" * outcome.off_format)


def _describe_interval(interval: Interval) -> str:
    if interval.value is None:
        return f"unscored ({interval.n_unscored})"
    return f"{format_interval(interval)}, n = {interval.n}, {interval.n_unscored} unscored"
