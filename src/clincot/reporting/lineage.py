"""From any id in a run folder to everything behind it: `clincot show`.

pair -> candidates -> regions -> question -> study -> image file
        judgements of each, by judge and prompt; the policy that answered; the configuration
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from clincot.config import load_params
from clincot.errors import BadInput
from clincot.geometry import box_to_text
from clincot.jsonl import file_digest, read_json
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

_LISTED = 20
_DATA_STAGES = ("propose", "answer", "judge", "pair")  # whose configuration a pair depends on


class NoSuchRecord(BadInput):
    """No record of the run begins with what was given."""


class AmbiguousId(BadInput):
    """Several records begin with what was given; the message lists them."""


@dataclass
class Node:
    """A line of the tree with what stands below it."""

    text: str
    below: list[Node] = field(default_factory=list)


def find_record(run_dir: Path, given: str) -> Record:
    """The record whose id begins with `given`; the hash alone, or an image's or checkpoint's sha256, will do too.

    Raises NoSuchRecord, AmbiguousId (which lists the records), BadRecord where the folder is no run.
    """
    given = given.strip()
    found: dict[str, Record] = {}
    for record in RunRecords(run_dir).beginning(given) if given else ():
        if record.id == given:
            return record
        found[record.id] = record
        if len(found) > _LISTED:
            break
    if not found:
        raise NoSuchRecord(
            f"no record in {run_dir} begins with {given!r}; expected an id such as pair-1a2b, as it stands on the page "
            "and in the run's .jsonl files"
        )
    if len(found) > 1:
        listed = "\n".join(f"  {one.id}  {_brief(one)}" for one in list(found.values())[:_LISTED])
        more = "\n  and more" if len(found) > _LISTED else ""
        raise AmbiguousId(f"{given!r} is the beginning of several ids:\n{listed}{more}")
    return next(iter(found.values()))


def explain_record(run_dir: Path, record: Record) -> str:
    """The record and everything behind it, as a tree of text; raises BadRecord where a link is broken."""
    return "\n".join(_printed(_Tree(RunRecords(run_dir)).node(record)))


def draw_record(run_dir: Path, record: Record) -> Image.Image:
    """The record's region over its radiograph, with the crop that the policy saw; of a pair, both sides.

    Raises NoPicture for what cannot be seen (a checkpoint, a decision, a report), BadImage for a bad image file.
    """
    return Illustrator(RunRecords(run_dir)).draw(record)


def _printed(node: Node) -> Iterator[str]:
    yield node.text
    for number, below in enumerate(node.below, start=1):
        last = number == len(node.below)
        first, *others = _printed(below)
        yield ("└─ " if last else "├─ ") + first
        yield from (("   " if last else "│  ") + line for line in others)


class _Tree:
    """Makes the tree of a record."""

    def __init__(self, records: RunRecords) -> None:
        self.records, self.run = records, records.run

    def node(self, record: Record) -> Node:
        match record:
            case PreferencePair():
                return self.pair(record)
            case Candidate():
                return self.candidate(record)
            case Region():
                return self.region(record, question=True)
            case Question():
                return self.question(record)
            case Study():
                return self.study(record)
            case Judgement():
                return self.judgement(record, candidate=True)
            case PanelScore():
                candidate = self.records.get(Candidate, record.candidate)
                return Node(_score_text(record), [self.candidate(candidate)])
            case Outcome():
                return self.outcome(record)
            case Reference():
                return Node(_reference_text(record), [self.question_named(record.question)])
            case Checkpoint():
                return self.checkpoint(record)
            case DataVersion():
                return _version_node(record)
            case Decision():
                return self.decision(record)
            case BenchmarkReport():
                return self.report(record)
        raise NoSuchRecord(f"{record.id}: nothing is known about where a {type(record).__name__} comes from")

    def pair(self, pair: PreferencePair) -> Node:
        _, path = self.records.found(PreferencePair, pair.id)
        sides = [
            (name, score, self.records.get(Candidate, one))
            for name, score, one in (
                ("chosen", pair.chosen_score, pair.chosen),
                ("rejected", pair.rejected_score, pair.rejected),
            )
        ]
        below = [
            Node(
                f"gap {pair.gap:.3f} = {pair.chosen_score:.3f} − {pair.rejected_score:.3f}, "
                f"judges' spread {pair.spread:.3f}" + (f", step {pair.step + 1}" if pair.step else "")
            ),
            self.question_named(pair.question),
        ]
        for name, score, candidate in sides:
            side = self.candidate(candidate, question=False)
            below.append(Node(f"{name} at {score:.3f}: {side.text}", side.below))
        digest = file_digest(path)
        for folder, checkpoint in layout.checkpoints(self.run):
            if checkpoint.pairs == digest:
                below.append(Node(f"trained {checkpoint.id}  {self._short(folder)}"))
        below.append(self.configuration())
        return Node(f"{pair.id}  preference pair  {self._short(path)}", below)

    def candidate(self, candidate: Candidate, *, question: bool = True) -> Node:
        below = [self.question_named(candidate.question)] if question else []
        below.append(self.region(self.records.get(Region, candidate.region), question=False))
        judgements = [self.judgement(j) for j in self.records.of_candidate(Judgement, candidate.id)]
        scores = self.records.of_candidate(PanelScore, candidate.id)
        below += [Node(_score_text(score), judgements) for score in scores] or judgements
        below.append(self.policy("answered by policy", candidate.policy))
        below.append(
            Node(
                f"prompt {candidate.prompt}, temperature {candidate.temperature:g}, seed {candidate.seed}, "
                f"log-probability {sum(candidate.token_logprobs):.3f} nats in {len(candidate.token_logprobs)} tokens"
            )
        )
        if candidate.parent:
            parent = self.candidate(self.records.get(Candidate, candidate.parent), question=False)
            below.append(Node(f"continues {parent.text}", parent.below))
        step = f" (step {candidate.step + 1})" if candidate.step or candidate.parent else ""
        return Node(f"{candidate.id}  “{candidate.text}”{step}", below)

    def region(self, region: Region, *, question: bool) -> Node:
        return Node(_region_text(region), [self.question_named(region.question)] if question else [])

    def question_named(self, one: str) -> Node:
        return self.question(self.records.get(Question, one))

    def question(self, question: Question) -> Node:
        topic = f", {question.topic}" if question.topic else ""
        study = self.study(self.records.get(Study, question.study))
        return Node(f"{question.id}  “{question.text}” ({question.kind}{topic})", [study])

    def study(self, study: Study) -> Node:
        folder = self.records.folder_of(study)
        path = folder / study.image
        if not path.is_file():
            state = "MISSING"
        else:
            state = "as recorded" if file_digest(path) == study.sha256 else "CHANGED since it was recorded"
        about = ", ".join(part for part in (study.modality, study.patient and f"patient {study.patient}") if part)
        return Node(
            f"{study.id}  {study.width} × {study.height} px" + (f", {about}" if about else ""),
            [Node(f"{path}  {state}"), Node(f"sha256 {study.sha256}")],
        )

    def judgement(self, judgement: Judgement, *, candidate: bool = False) -> Node:
        given = f"unscored: {judgement.reason}" if judgement.score is None else f"{judgement.score:.3f}"
        below = [Node(f"judge {judgement.judge}, prompt {judgement.prompt}")]
        if candidate:
            below.append(self.candidate(self.records.get(Candidate, judgement.candidate)))
        return Node(f"{judgement.id}  {self._judge(judgement)} {given}", below)

    def outcome(self, outcome: Outcome) -> Node:
        reference = self.records.get(Reference, outcome.reference)
        below = [
            self.question_named(outcome.question),
            Node(_reference_text(reference)),
            Node(f"looked at {box_to_text(outcome.box)} percent ({outcome.arm}){_seen(outcome)}"),
            self.policy("answered by policy", outcome.policy),
        ]
        verdict = {True: "right", False: "wrong", None: "could not be scored"}[outcome.correct]
        return Node(f"{outcome.id}  “{outcome.answer}” {verdict}", below)

    def checkpoint(self, checkpoint: Checkpoint) -> Node:
        known = self.records.checkpoint_of(checkpoint.sha256)
        folder = Path(checkpoint.uri) if known is None else known[1]
        below = [Node(f"sha256 {checkpoint.sha256}")]
        if checkpoint.parent:
            below.append(self.policy("trained from policy", checkpoint.parent))
        for path, kind in self.records.files:
            if kind is PreferencePair and checkpoint.pairs == file_digest(path):
                below.append(Node(f"pairs {self._short(path)}  sha256 {checkpoint.pairs}"))
        if checkpoint.data_revision:
            below.append(Node(f"kept at revision {checkpoint.data_revision} of the data repository"))
        train = load_params(self.run / layout.PARAMS).train.digest
        as_run = (
            "params.yaml's" if checkpoint.config == train else "not params.yaml's: a comparison's, or it was changed"
        )
        below.append(Node(f"train section {checkpoint.config} ({as_run})"))
        if (log := folder / layout.TRAIN_LOG).is_file() and (entries := read_json(log)):
            below.append(Node(f"last of {len(entries)} logged steps: {json.dumps(entries[-1], sort_keys=True)}"))
        return Node(f"{checkpoint.id}  checkpoint  {self._short(folder)}", below)

    def decision(self, decision: Decision) -> Node:
        below = [
            Node(f"{decision.metric}: challenger − champion {_interval(decision.difference)}"),
            *(Node(reason) for reason in decision.reasons),
            self.policy("champion", decision.champion),
            self.policy("challenger", decision.challenger),
            Node(f"benchmark {decision.benchmark}"),
        ]
        return Node(f"{decision.id}  {decision.verdict}", below)

    def report(self, report: BenchmarkReport) -> Node:
        arms = [
            Node(f"{arm}: accuracy {_interval(metrics['accuracy'])}")
            for arm, metrics in report.metrics.items()
            if "accuracy" in metrics
        ]
        below = [*arms, self.policy("policy", report.policy), Node(f"benchmark {report.benchmark}")]
        return Node(f"{report.id}  report, {report.protocol}", below)

    def policy(self, role: str, digest: str) -> Node:
        known = self.records.checkpoint_of(digest)
        if known is not None:
            return Node(f"{role} {digest}  {self._short(known[1])}, {known[0].id}")
        place = layout.policies(self.run).get(digest)
        return Node(f"{role} {digest}  " + ("not one of this run's" if place is None else f"the base, {place}"))

    def configuration(self) -> Node:
        params = load_params(self.run / layout.PARAMS)
        sections = [Node(f"{name} {getattr(params, name).digest}") for name in _DATA_STAGES]
        return Node(f"configuration {self._short(self.run / layout.PARAMS)}", sections)

    def _judge(self, judgement: Judgement) -> str:
        names: dict[str, str] = {}
        for folder in layout.round_folders(self.run):
            names |= layout.judge_names(folder)
        return names.get(judgement.judge, "a judge that no panel report names")

    def _short(self, path: Path) -> str:
        return str(path.relative_to(self.run)) if path.is_relative_to(self.run) else str(path)


def _brief(record: Record) -> str:
    """A record in a few words, for a list."""
    match record:
        case PreferencePair():
            return f"gap {record.gap:.3f}"
        case Candidate() | Question():
            return f"“{record.text}”"
        case Region():
            return _region_text(record).partition("  ")[2]
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


def _version_node(version: DataVersion) -> Node:
    where = f"{version.tag} of {version.repository}, revision {version.revision}"
    below = [
        Node(where if version.revision else f"not versioned: {version.unversioned}"),
        Node(f"sha256 {version.sha256}, {version.size} bytes"),
        *(Node(f"{file.name}  sha256 {file.sha256}") for file in version.files),
    ]
    return Node(f"{version.id}  preference data: {version.pairs} pairs of {version.candidates} candidates", below)


def _region_text(region: Region) -> str:
    sure = "" if region.grounder == "whole" else f", confidence {region.confidence:.3f}"
    return f"{region.id}  {region.hypothesis} at {box_to_text(region.box)} percent, by {region.grounder}{sure}"


def _score_text(score: PanelScore) -> str:
    given = f"unscored: {score.reason}" if score.score is None else f"{score.score:.3f} ± {score.spread:.3f}"
    return f"{score.id}  panel {given}, {score.judges} judges"


def _reference_text(reference: Reference) -> str:
    places = ", ".join(box_to_text(box) for box in reference.boxes) or "nowhere in particular"
    return f"{reference.id}  answer key: “{reference.answer}”, seen at {places}"


def _seen(outcome: Outcome) -> str:
    hit = "" if outcome.hit is None else (", a hit" if outcome.hit else ", a miss")
    return hit + ("" if outcome.iou is None else f", IoU {outcome.iou:.3f}") + (", off format" * outcome.off_format)


def _interval(interval: Interval) -> str:
    if interval.value is None:
        return f"unscored ({interval.n_unscored})"
    limits = "" if interval.low is None or interval.high is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{interval.value:.3f}{limits}, n = {interval.n}, {interval.n_unscored} unscored"
