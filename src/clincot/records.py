"""Records that the stages exchange: frozen models whose id is a hash of their content.

In the order of a round: Study and Question (with the answer key, Reference, in a separate file) -> Region ->
Candidate -> Judgement -> PanelScore -> PreferencePair -> DataVersion -> Checkpoint -> Outcome -> Decision.

An id hashes the *content only* (inputs, texts, scores, configuration). Where and when a record was made is provenance
and does not enter the id, so the same work has the same id on a laptop and on a cluster. A record holds the ids of
the records it was made from, so every pair can be traced back to its image (`clincot show <id>`).

The answer key is a separate record in a separate file: the stages propose, answer, judge and pair never receive that
file, so the truth cannot leak into preference data.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from clincot.fields import FiniteFloat, FrozenModel, NonEmptyStr, Sha256, UnitFloat
from clincot.geometry import Box, Cutout, RegionMask, Surroundings, cut_out_region

OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # the names of a multiple-choice question's options, in their order


def format_time_now() -> str:
    """The time for a record: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def hash_json(content: Any) -> str:
    """Compute the sha256 (hex) of canonical JSON: sorted keys, no spaces. Raises ValueError for NaN and infinity."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Record(FrozenModel):
    """Base class of records. `id` is computed if it is empty and verified otherwise."""

    prefix: ClassVar[str] = "record"
    provenance: ClassVar[frozenset[str]] = frozenset()  # fields that the id does not cover

    version: Literal[1] = 1
    id: str = ""

    @model_validator(mode="after")
    def _set_content_id(self) -> Self:
        content = self.model_dump(mode="json", exclude={"id", *self.provenance})
        expected = f"{self.prefix}-{hash_json(content)[:20]}"
        if self.id == "":
            object.__setattr__(self, "id", expected)
        elif self.id != expected:
            raise ValueError(f"id {self.id!r} does not match the record's content ({expected!r})")
        return self

    def replace_fields(self, **fields: Any) -> Self:
        """A validated copy with other values in some fields, and with the id of its own content."""
        return self.model_validate(self.model_dump(exclude={"id"}) | fields)


class Study(Record):
    """One image. `image` is its path relative to the data set folder."""

    prefix: ClassVar[str] = "study"
    provenance: ClassVar[frozenset[str]] = frozenset({"image", "split", "source_id"})

    image: NonEmptyStr
    sha256: Sha256  # of the image file's bytes
    width: Annotated[int, Field(ge=1)]  # pixels
    height: Annotated[int, Field(ge=1)]
    modality: str = ""
    patient: str = ""  # groups studies for splits and intervals; never a real identity
    split: str = ""
    source_id: str = ""


class OtherImage(FrozenModel):
    """A further image that a question is about, such as an earlier examination."""

    study: NonEmptyStr
    role: NonEmptyStr  # "prior", "lateral", … or "image 2"


class Question(Record):
    """A question about a study, without its answer (which is a Reference)."""

    prefix: ClassVar[str] = "question"
    provenance: ClassVar[frozenset[str]] = frozenset({"source_id"})

    study: NonEmptyStr
    text: Annotated[str, Field(min_length=1, pattern=r"\S")]
    kind: Literal["closed", "open", "report", "choice"]  # report: the answer is a whole report; choice: an option
    topic: str = ""
    source_id: str = ""
    # Absent where empty, so that questions without options or further images keep their ids.
    options: Annotated[
        tuple[NonEmptyStr, ...], Field(max_length=len(OPTION_LETTERS), exclude_if=lambda value: not value)
    ] = ()  # of a choice, in order
    others: Annotated[tuple[OtherImage, ...], Field(exclude_if=lambda value: not value)] = ()  # in order, after `study`

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if (self.kind == "choice") != bool(self.options):
            raise ValueError(f"a question has options if it is a choice, got kind {self.kind!r} and {self.options}")
        return self

    @property
    def asked_text(self) -> str:
        """The question as a policy or judge is asked it: the text, and the options with their letters."""
        lines = [f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, self.options, strict=False)]
        return "\n".join([self.text, *lines])


class Reference(Record):
    """The answer key of one question. Only evaluation and calibration read it."""

    prefix: ClassVar[str] = "reference"

    question: NonEmptyStr
    answer: Annotated[str, Field(min_length=1, pattern=r"\S")]
    boxes: tuple[Box, ...] = ()  # regions that show the answer; empty: unknown, or the finding is absent
    finding: str = ""
    # The pixels of each box, in order; null where only the box is known. Absent without any.
    masks: Annotated[tuple[RegionMask | None, ...], Field(exclude_if=lambda value: not value)] = ()

    @model_validator(mode="after")
    def _check_masks(self) -> Self:
        if self.masks and len(self.masks) != len(self.boxes):
            raise ValueError(f"masks belong to boxes, one each, got {len(self.masks)} and {len(self.boxes)}")
        return self


class Region(Record):
    """A region to look at: a hypothesis about a question, grounded in the image."""

    prefix: ClassVar[str] = "region"

    question: NonEmptyStr
    hypothesis: NonEmptyStr  # "pneumonia", "normal", …; "whole image" for the region that every question has
    box: Box
    confidence: UnitFloat
    grounder: NonEmptyStr  # "windows", "relevance", "written", "http", "oracle", "random", "whole"
    # The pixels of the region, if its grounder segments, and how its crop shows the surroundings of the mask. Absent
    # without a mask, or where the surroundings are shown.
    mask: Annotated[RegionMask | None, Field(exclude_if=lambda value: value is None)] = None
    outside: Annotated[Surroundings, Field(exclude_if=lambda value: value == "shown")] = "shown"

    @property
    def cutout(self) -> Cutout | None:
        """How the region's crop is cut out; None: it shows the whole square."""
        return cut_out_region(self.mask, self.outside)


class Candidate(Record):
    """A policy's answer from one region. region_written: the policy wrote that region itself."""

    prefix: ClassVar[str] = "candidate"

    question: NonEmptyStr
    region: NonEmptyStr
    text: str  # may be empty: an empty answer is judged like any other
    token_logprobs: tuple[FiniteFloat, ...]  # nats, one per sampled token of the answer
    region_written: bool = False
    step: Annotated[int, Field(ge=0)] = 0
    parent: str = ""  # the previous step's candidate that this one continues; "" in the first step
    policy: NonEmptyStr  # the policy's digest
    prompt: NonEmptyStr  # digest of the prompt wording
    seed: int
    temperature: Annotated[float, Field(ge=0)]


class Judgement(Record):
    """One judge's probability that a candidate is right; None, with a reason, if it could not be read."""

    prefix: ClassVar[str] = "judgement"

    candidate: NonEmptyStr
    judge: NonEmptyStr  # the judge's digest
    prompt: NonEmptyStr
    score: UnitFloat | None
    reason: str = ""

    @model_validator(mode="after")
    def _require_reason(self) -> Self:
        if self.score is None and not self.reason:
            raise ValueError("a judgement without a score must say why in `reason`")
        return self


class PanelScore(Record):
    """The panel's calibrated score of a candidate, and the spread of its judges."""

    prefix: ClassVar[str] = "score"

    candidate: NonEmptyStr
    score: UnitFloat | None
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # standard deviation across judges
    judges: Annotated[int, Field(ge=0)]  # number of judges that gave a score
    reason: str = ""


class PreferencePair(Record):
    """Two candidates of one question and step, the better one first. Training computes the margin."""

    prefix: ClassVar[str] = "pair"

    question: NonEmptyStr
    chosen: NonEmptyStr
    rejected: NonEmptyStr
    chosen_region: NonEmptyStr
    rejected_region: NonEmptyStr
    chosen_score: FiniteFloat  # s_cur + gamma * s_next
    rejected_score: FiniteFloat
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # mean spread of the two candidates
    step: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check_score_order(self) -> Self:
        if self.chosen_score <= self.rejected_score:
            raise ValueError(f"chosen must score above rejected, got {self.chosen_score} <= {self.rejected_score}")
        return self

    @property
    def gap(self) -> float:
        return self.chosen_score - self.rejected_score


class DataFile(FrozenModel):
    """One file of a version of preference data."""

    name: NonEmptyStr
    sha256: Sha256
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # the name of its object in a DVC remote
    size: Annotated[int, Field(ge=0)]  # bytes


class DataVersion(Record):
    """A version of a round's preference data, and the revision of the data repository that holds it.

    `revision` is "" if the data was not committed; `unversioned` then holds the reason.
    """

    prefix: ClassVar[str] = "data"
    provenance: ClassVar[frozenset[str]] = frozenset(
        {"repository", "revision", "tag", "line", "round", "run", "unversioned"}
    )

    sha256: Sha256  # of the files' names and digests
    files: tuple[DataFile, ...]  # sorted by name
    pairs: Annotated[int, Field(ge=0)]  # number of pairs; the next two fields are numbers too
    questions: Annotated[int, Field(ge=0)]
    candidates: Annotated[int, Field(ge=0)]
    policies: tuple[NonEmptyStr, ...]  # digests of the policies that wrote the candidates
    judges: dict[str, str]  # {name: digest}
    alpha: FiniteFloat | None  # Krippendorff's alpha of the judges' calibrated scores; None: undefined
    repository: str = ""  # its address, without credentials
    revision: str = ""  # the commit
    tag: str = ""  # for instance preferences/nodules/round-0001
    line: str = ""  # the model line; "": the data belongs to no line
    round: Annotated[int, Field(ge=0)] = 0
    run: str = ""  # the run that committed the version
    unversioned: str = ""

    @property
    def size(self) -> int:
        """Total size in bytes."""
        return sum(file.size for file in self.files)

    @model_validator(mode="after")
    def _check_revision(self) -> Self:
        if bool(self.revision) and bool(self.unversioned):
            raise ValueError("a version has either `revision` or `unversioned`, not both")
        return self


class Checkpoint(Record):
    """A trained policy. Its digest identifies it; its location is provenance."""

    prefix: ClassVar[str] = "checkpoint"
    provenance: ClassVar[frozenset[str]] = frozenset({"uri", "git", "created", "data", "data_revision"})

    uri: NonEmptyStr
    sha256: Sha256
    parent: str = ""  # digest of the policy it was trained from; "" for a base model
    pairs: str = ""  # digest of the preference data; "" for a base model
    config: str = ""  # digest of the training configuration
    round: Annotated[int, Field(ge=0)] = 0
    data: str = ""  # sha256 of the DataVersion that holds the pairs; "": unknown
    data_revision: str = ""  # commit of the data repository; "": not committed
    git: str = ""
    created: str = ""


class Outcome(Record):
    """A policy's answer to one benchmark question, from one kind of region (the arm)."""

    prefix: ClassVar[str] = "outcome"

    question: NonEmptyStr
    policy: NonEmptyStr
    arm: NonEmptyStr  # source of the region: "written", "windows", "random", "oracle", "whole", …
    box: Box
    answer: str
    reference: NonEmptyStr  # the Reference's id
    correct: bool | None  # by the strict protocol; None: the answer is unreadable, or a report
    hit: bool | None = None  # None: the question has no reference box
    iou: UnitFloat | None = None
    off_format: bool = False
    # Only where they hold, and absent elsewhere: the policy wrote no readable region; the mean P(right) of a panel that
    # saw the reference (open answers only), and the digests of its judges.
    no_region: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    panel_score: Annotated[UnitFloat | None, Field(exclude_if=lambda value: value is None)] = None
    graders: Annotated[tuple[NonEmptyStr, ...], Field(exclude_if=lambda value: not value)] = ()
    # Only in the arm `served`, and absent elsewhere: a hash of the settings that decide the answer, and by how much the
    # answer and its region lead the next best ones (0 to 1).
    settings: Annotated[str, Field(exclude_if=lambda value: not value)] = ""
    lead: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    region_lead: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None


class MeasuredAnswer(FrozenModel):
    """An answer of the arm `served` that leads clearly, so that any machine with the checkpoint gives it."""

    question: NonEmptyStr
    answer: str
    box: Box | None  # the region that it came from; None if no region leads clearly


class ServedSample(FrozenModel):
    """Benchmark questions that a rollout asks the deployed server, with the answers that the gate measured."""

    settings: NonEmptyStr  # hash of the settings that decide the answers
    answers: tuple[MeasuredAnswer, ...]


class Interval(FrozenModel):
    """A value with its 95 % interval (cluster bootstrap). None: it cannot be computed."""

    value: FiniteFloat | None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    n: Annotated[int, Field(ge=0)]
    n_unscored: Annotated[int, Field(ge=0)] = 0
    clusters: Annotated[int, Field(ge=0)] = 0


class BenchmarkReport(Record):
    """A policy's metrics on a benchmark: {arm: {metric: interval}}."""

    prefix: ClassVar[str] = "report"

    benchmark: NonEmptyStr  # digest of questions and references
    policy: NonEmptyStr
    protocol: NonEmptyStr
    metrics: dict[str, dict[str, Interval]]
    served: Annotated[ServedSample | None, Field(exclude_if=lambda value: value is None)] = None


class Totals(FrozenModel):
    """Sums over the clusters (patients) of one compared metric. Totals of disjoint patients can be added.

    For one cluster, s is the sum of its differences (higher is better) and m the number of its scored questions.
    """

    clusters: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=0)] = 0  # sum of m
    total: FiniteFloat = 0.0  # sum of s
    squares: FiniteFloat = 0.0  # sum of s^2
    cross: FiniteFloat = 0.0  # sum of s m
    sizes: FiniteFloat = 0.0  # sum of m^2
    n_unscored: Annotated[int, Field(ge=0)] = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(**{name: getattr(self, name) + getattr(other, name) for name in Totals.model_fields})


class PromotionCheck(FrozenModel):
    """One condition of a promotion: a paired, clustered, one-sided test of the challenger."""

    name: NonEmptyStr  # "accuracy", "closed_accuracy", …
    role: Literal["gain", "guard", "blind"]
    better: Literal["higher", "lower"]
    challenger: FiniteFloat | None  # mean over the compared questions
    other: FiniteFloat | None  # the champion's, or the blind baseline's
    difference: Interval  # challenger - other, on this look's questions
    # The challenger must be shown to be above other + threshold (or below it, if lower is better).
    threshold: FiniteFloat
    # challenger - other over all looks of this challenger; equal to `difference` in the first look
    pooled: FiniteFloat | None
    error: FiniteFloat | None  # standard error of `pooled`
    bound: FiniteFloat | None  # one-sided confidence bound of `pooled` at the test's level
    p: UnitFloat | None
    n: Annotated[int, Field(ge=0)]  # questions, over all looks
    clusters: Annotated[int, Field(ge=0)]  # patients, over all looks
    passed: bool
    reason: NonEmptyStr


class GateFinding(FrozenModel):
    """The result of a check of the data or of the judges."""

    name: NonEmptyStr
    severity: Literal["ok", "warn", "block"]
    value: FiniteFloat | None
    threshold: FiniteFloat | None
    reason: NonEmptyStr


class Budget(FrozenModel):
    """This decision's share of the lifetime budget of promotion errors (promotion/error_budget.py)."""

    lifetime: UnitFloat  # allowed probability of ever promoting a worse policy
    number: Annotated[int, Field(ge=1)]  # of the decision in the ledger, from 1
    challenger_number: Annotated[int, Field(ge=1)]
    look: Annotated[int, Field(ge=1)]  # number of times this challenger was compared with this champion
    challenger_level: UnitFloat  # level of all looks of this challenger together
    passed_on: UnitFloat = 0.0  # part of it that comes from challengers promoted just before
    level: UnitFloat  # level of this look; every check is tested at it
    spent_before: Annotated[float, Field(ge=0)] = 0.0


class BenchmarkReuse(FrozenModel):
    """How often decisions have used the benchmark's questions, this decision included."""

    slice: Annotated[int, Field(ge=1)]
    slices: Annotated[int, Field(ge=1)]
    questions: Annotated[int, Field(ge=0)]
    fresh: Annotated[int, Field(ge=0)]  # used by no earlier decision
    worn: Annotated[int, Field(ge=0)]  # excluded: used as often as allowed
    most_uses: Annotated[int, Field(ge=0)]
    allowed: Annotated[int, Field(ge=1)]


class Decision(Record):
    """Whether the challenger replaces the champion, with the evidence."""

    prefix: ClassVar[str] = "decision"

    champion: NonEmptyStr
    challenger: NonEmptyStr
    benchmark: NonEmptyStr
    metric: NonEmptyStr
    difference: Interval  # challenger - champion, paired by question
    verdict: Literal["promote", "keep", "blocked"]
    reasons: tuple[NonEmptyStr, ...]
    checks: tuple[PromotionCheck, ...] = ()
    findings: tuple[GateFinding, ...] = ()
    budget: Budget | None = None  # None: nothing was tested, so nothing was spent
    reuse: BenchmarkReuse | None = None
    base: Interval | None = None  # challenger - base policy; reported, not tested
    inputs: dict[str, str] = Field(default_factory=dict)  # {input: sha256}
    settings: dict[str, Any] = Field(default_factory=dict)  # the decide configuration
    evidence: str = ""  # digest of the compared outcomes; the same evidence is decided on only once
    # Hash of the settings with which the arm `served` answered, if the decision rests on it; only a server with these
    # settings gives the answers that were decided on. Absent for another arm.
    served: Annotated[str, Field(exclude_if=lambda value: not value)] = ""


class StartingPolicy(Record):
    """The policy that a round starts from. It is resolved once, in preflight; later stages use this record.

    source: "champion" if the model has a champion; otherwise "base", the checkpoint of preflight.base, as round 0.
    """

    prefix: ClassVar[str] = "start"
    provenance: ClassVar[frozenset[str]] = frozenset({"uri"})

    line: NonEmptyStr
    uri: NonEmptyStr  # address of the published checkpoint, or the folder of an unpublished base
    sha256: Sha256
    round: Annotated[int, Field(ge=0)]
    source: Literal["champion", "base"]
    published: bool  # False: `uri` is a local folder
