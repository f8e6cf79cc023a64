"""What flows between the stages: frozen records with content-hash ids.

A round makes, in this order: Study and Question (with the answer key, Reference, in a file of its own) ->
Region -> Candidate -> Judgement -> PanelScore -> PreferencePair -> DataVersion -> Checkpoint -> Outcome -> Decision.

An id hashes *content only* (inputs, texts, scores, config); where and when a record was made is provenance
beside it, so the same work has the same id on a laptop and on a cluster. Children carry their parents' ids:
from any pair one can walk back to the image (`clincot show <id>`).

The answer key is a separate record in a separate file on purpose: the stages propose, answer, judge and pair
are never given that file, so truth cannot leak into preference data.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from clincot.fields import FiniteFloat, FrozenModel, NonEmptyStr, Sha256, UnitFloat
from clincot.geometry import Box


def hash_json(content: Any) -> str:
    """sha256 (hex) of canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Record(FrozenModel):
    """A frozen record. `id` is filled in when left out and checked when given."""

    prefix: ClassVar[str] = "record"
    provenance: ClassVar[frozenset[str]] = frozenset()  # fields that do not enter the id

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


class Study(Record):
    """One image. `image` is its path relative to the data set's folder."""

    prefix: ClassVar[str] = "study"
    provenance: ClassVar[frozenset[str]] = frozenset({"image", "split", "source_id"})

    image: NonEmptyStr
    sha256: Sha256  # of the image file's bytes
    width: Annotated[int, Field(ge=1)]  # pixels
    height: Annotated[int, Field(ge=1)]
    modality: str = ""
    patient: str = ""  # grouping key for splits and intervals; never an identity
    split: str = ""
    source_id: str = ""


class Question(Record):
    """A question about a study, without its answer (see Reference)."""

    prefix: ClassVar[str] = "question"
    provenance: ClassVar[frozenset[str]] = frozenset({"source_id"})

    study: NonEmptyStr
    text: Annotated[str, Field(min_length=1, pattern=r"\S")]
    kind: Literal["closed", "open", "report"]  # report: the answer is a whole report
    topic: str = ""
    source_id: str = ""


class Reference(Record):
    """The answer key of one question. Read by evaluation and calibration only."""

    prefix: ClassVar[str] = "reference"

    question: NonEmptyStr
    answer: Annotated[str, Field(min_length=1, pattern=r"\S")]
    boxes: tuple[Box, ...] = ()  # where the answer can be seen; empty: unknown, or an absent finding
    finding: str = ""


class Region(Record):
    """A place to look: a hypothesis about a question, grounded in the image."""

    prefix: ClassVar[str] = "region"

    question: NonEmptyStr
    hypothesis: NonEmptyStr  # "pneumonia", "normal", …; "whole image" for the region that is always there
    box: Box
    confidence: UnitFloat
    grounder: NonEmptyStr  # "windows", "relevance", "written", "http", "oracle", "random", "whole"


class Candidate(Record):
    """A policy's answer from one region; with `region_written`, the policy wrote that region itself."""

    prefix: ClassVar[str] = "candidate"

    question: NonEmptyStr
    region: NonEmptyStr
    text: str  # may be empty: an empty answer is an answer, and judged so
    token_logprobs: tuple[FiniteFloat, ...]  # nats, of the answer's tokens as sampled
    region_written: bool = False
    step: Annotated[int, Field(ge=0)] = 0
    parent: str = ""  # the candidate of the step before that this one continues; "" at the chain's start
    policy: NonEmptyStr  # the policy's digest
    prompt: NonEmptyStr  # digest of the prompt wording
    seed: int
    temperature: Annotated[float, Field(ge=0)]


class Judgement(Record):
    """One judge's probability that a candidate is right; None (with a reason) where it could not be read."""

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
    """The panel's calibrated score of a candidate, and how far its judges were apart."""

    prefix: ClassVar[str] = "score"

    candidate: NonEmptyStr
    score: UnitFloat | None
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # standard deviation across judges
    judges: Annotated[int, Field(ge=0)]  # how many gave a score
    reason: str = ""


class PreferencePair(Record):
    """Two candidates of one question and step, the better first. The margin is computed in train."""

    prefix: ClassVar[str] = "pair"

    question: NonEmptyStr
    chosen: NonEmptyStr
    rejected: NonEmptyStr
    chosen_region: NonEmptyStr
    rejected_region: NonEmptyStr
    chosen_score: FiniteFloat  # s_cur + gamma * s_next
    rejected_score: FiniteFloat
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # mean of the two sides' spreads
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
    """A round's preference data: what it is, and the revision of the data repository that keeps it.

    `revision` is "" where it was kept nowhere; `unversioned` then says why.
    """

    prefix: ClassVar[str] = "data"
    provenance: ClassVar[frozenset[str]] = frozenset({"repository", "revision", "tag", "round", "unversioned"})

    sha256: Sha256  # of the files' names and digests
    files: tuple[DataFile, ...]  # by name
    pairs: Annotated[int, Field(ge=0)]  # how many
    questions: Annotated[int, Field(ge=0)]
    candidates: Annotated[int, Field(ge=0)]
    policies: tuple[NonEmptyStr, ...]  # digests of the policies that answered
    judges: dict[str, str]  # {name: digest}
    alpha: FiniteFloat | None  # the judges' agreement (Krippendorff, calibrated scores); None: not to be had
    repository: str = ""  # its address, without credentials
    revision: str = ""  # the commit
    tag: str = ""  # preferences/round-0001
    round: Annotated[int, Field(ge=0)] = 0
    unversioned: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @model_validator(mode="after")
    def _check_revision(self) -> Self:
        if bool(self.revision) and bool(self.unversioned):
            raise ValueError("a version has a revision, or says why it has none, not both")
        return self


class Checkpoint(Record):
    """A trained policy: its digest is its identity, where it lies is provenance."""

    prefix: ClassVar[str] = "checkpoint"
    provenance: ClassVar[frozenset[str]] = frozenset({"uri", "git", "created", "data", "data_revision"})

    uri: NonEmptyStr
    sha256: Sha256
    parent: str = ""  # digest of the policy it was trained from; "" for a base model
    pairs: str = ""  # digest of the preference data; "" for a base model
    config: str = ""  # digest of the train section
    round: Annotated[int, Field(ge=0)] = 0
    data: str = ""  # sha256 of the DataVersion that holds the pairs; "" where none was named
    data_revision: str = ""  # the commit of the data repository that keeps it; "" where none does
    git: str = ""
    created: str = ""


class Outcome(Record):
    """One benchmark question answered by one policy looking at one kind of region."""

    prefix: ClassVar[str] = "outcome"

    question: NonEmptyStr
    policy: NonEmptyStr
    arm: NonEmptyStr  # where the region came from: "written", "windows", "random", "oracle", "whole", …
    box: Box
    answer: str
    reference: NonEmptyStr  # the Reference's id
    correct: bool | None  # strict protocol; None: no answer could be read, or it is a report
    hit: bool | None = None  # None: the question has no reference box
    iou: UnitFloat | None = None
    off_format: bool = False


class Interval(FrozenModel):
    """A value with its 95 % interval (cluster bootstrap); None where it cannot be computed."""

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


class Totals(FrozenModel):
    """Sums over the clusters (patients) of one compared metric; those of disjoint patients add up.

    s is a cluster's sum of values (differences, higher is better), m how many questions it has scored.
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
    """One condition of a promotion: a paired, clustered, one-sided test of the challenger against something."""

    name: NonEmptyStr  # "accuracy", "closed_accuracy", …
    role: Literal["gain", "guard", "blind"]
    better: Literal["higher", "lower"]
    challenger: FiniteFloat | None  # its mean over the questions compared
    other: FiniteFloat | None  # the champion's, or the blind baseline's
    difference: Interval  # challenger - other, of this look's questions
    threshold: (
        FiniteFloat  # the challenger must be shown to be better than other + threshold (lower is better: below it)
    )
    pooled: (
        FiniteFloat | None
    )  # challenger - other over all looks of this challenger; without earlier looks `difference`
    error: FiniteFloat | None  # standard error of `pooled`
    bound: FiniteFloat | None  # one-sided confidence bound of `pooled` at the test's level
    p: UnitFloat | None
    n: Annotated[int, Field(ge=0)]  # questions, over all looks
    clusters: Annotated[int, Field(ge=0)]  # patients, over all looks
    passed: bool
    reason: NonEmptyStr


class GateFinding(FrozenModel):
    """What a look at the data or the judges found."""

    name: NonEmptyStr
    severity: Literal["ok", "warn", "block"]
    value: FiniteFloat | None
    threshold: FiniteFloat | None
    reason: NonEmptyStr


class Budget(FrozenModel):
    """Where this decision stands in the lifetime budget of promotion errors (promotion/error_budget.py)."""

    lifetime: UnitFloat  # the probability of ever promoting wrongly that the pipeline may have
    number: Annotated[int, Field(ge=1)]  # of this decision in the ledger
    challenger_number: Annotated[int, Field(ge=1)]
    look: Annotated[int, Field(ge=1)]  # of this challenger at this champion
    challenger_level: UnitFloat  # for all looks of this challenger together
    passed_on: UnitFloat = 0.0  # how much of it comes from challengers promoted just before
    level: UnitFloat  # of this look: every check is tested at it
    spent_before: Annotated[float, Field(ge=0)] = 0.0


class BenchmarkReuse(FrozenModel):
    """How often the benchmark's questions have been decided on, this decision included."""

    slice: Annotated[int, Field(ge=1)]
    slices: Annotated[int, Field(ge=1)]
    questions: Annotated[int, Field(ge=0)]
    fresh: Annotated[int, Field(ge=0)]  # never decided on before
    worn: Annotated[int, Field(ge=0)]  # left out: decided on as often as allowed
    most_uses: Annotated[int, Field(ge=0)]
    allowed: Annotated[int, Field(ge=1)]


class Decision(Record):
    """Whether the challenger takes the champion's place, with the numbers that say so."""

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
    budget: Budget | None = None  # None: nothing was tested, nothing is spent
    reuse: BenchmarkReuse | None = None
    base: Interval | None = None  # challenger - base policy, reported beside the test
    inputs: dict[str, str] = Field(default_factory=dict)  # {input: sha256}
    settings: dict[str, Any] = Field(default_factory=dict)  # the decide section
    evidence: str = ""  # digest of what was compared; the same evidence is decided on once


class StartingPolicy(Record):
    """What a round starts from, resolved once: nobody after preflight looks for the latest.

    source: "champion" where the line has a pointer; "base", as round 0, where it has none and preflight.base names one.
    """

    prefix: ClassVar[str] = "start"
    provenance: ClassVar[frozenset[str]] = frozenset({"uri"})

    line: NonEmptyStr
    uri: NonEmptyStr  # of the published checkpoint, or the folder of a base that is not published
    sha256: Sha256
    round: Annotated[int, Field(ge=0)]
    source: Literal["champion", "base"]
    published: bool  # False: `uri` is a folder of this machine
