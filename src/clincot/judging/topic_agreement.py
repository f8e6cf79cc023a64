"""Whether the judges of a panel know a topic at all, measured by their agreement with each other.

No answer key is read. Two judges that do not know a topic rank the answers to its questions each in its own way, so
agreement on *which of two answers from one region is better* is evidence of knowledge, and its absence is evidence of
noise.

Agreement is not proof, since judges may share a prejudice, such as calling every margin smooth that they cannot see. A
prejudice does not depend on the image, so it shows as the share of the panel's preferences that the answer's text
alone explains.

Measured for each group (`pair.agreement_by`). A group is a topic, so that where the judges know the topic, regions that
do not show the finding make pairs too: there the judges' preferences are chance, and a policy that they train answers
with less certainty from such regions. Or a group is a topic seen through one grounder's regions: the same judges may
read a lesion's margin in a window that shows it, and know nothing of it from the whole image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from clincot.errors import InvalidInput
from clincot.fields import FrozenModel
from clincot.records import Candidate, Judgement
from clincot.text import normalize_text

MIN_ANSWERS = 20  # fewer answers with a rival in their region say nothing of a group


class GroupAgreement(FrozenModel):
    """How the judges agree on one group of candidates."""

    answers: Annotated[int, Field(ge=0)]  # scored by all judges, with a different answer from the same region
    # Mean Pearson correlation, over all pairs of judges, of the scores minus their mean over the region's answers; None
    # if there are fewer than MIN_ANSWERS answers, or a judge scores all of them alike.
    correlation: Annotated[float, Field(ge=-1, le=1)] | None
    # Share of the variance of the panel's mean score, minus its mean over the region's answers, between answers of
    # different text: 0 if what the panel prefers depends on the image alone, 1 if it always prefers the same answer.
    prejudice: Annotated[float, Field(ge=0, le=1)] | None = None


@dataclass(frozen=True)
class PanelKnowledge:
    """What the agreement of a panel's judges says about each group of candidates."""

    groups: CandidateGroups
    agreement: dict[str, GroupAgreement]
    min_agreement: float
    max_prejudice: float

    @property
    def left_out(self) -> tuple[str, ...]:
        """The groups that miss a bound, or have too few answers to tell."""
        return tuple(group for group, found in self.agreement.items() if not self._meets_bounds(found))

    def is_trusted(self, candidate: Candidate) -> bool:
        """Whether the panel's scores of the candidate may be compared with those of others."""
        found = self.agreement.get(self.groups.get_group(candidate))
        return found is not None and self._meets_bounds(found)

    def _meets_bounds(self, found: GroupAgreement) -> bool:
        if found.correlation is None or found.prejudice is None:
            return False
        return found.correlation >= self.min_agreement and found.prejudice <= self.max_prejudice


@dataclass(frozen=True)
class CandidateGroups:
    """The group of each candidate: "TOPIC, GROUNDER", or "TOPIC"; a question without a topic counts by its kind."""

    topics: Mapping[str, str]  # question id -> topic or kind
    grounders: Mapping[str, str] | None  # region id -> name of the grounder; None: grounders are not told apart

    def get_group(self, candidate: Candidate) -> str:
        """The candidate's group; raises InvalidInput for a question or region that is not in the files."""
        topic = self.topics.get(candidate.question)
        if topic is None:
            raise InvalidInput(f"{candidate.id} names {candidate.question}, which is not in the round's questions")
        if self.grounders is None:
            return topic
        grounder = self.grounders.get(candidate.region)
        if grounder is None:
            raise InvalidInput(f"{candidate.id} names {candidate.region}, which is not in the round's regions")
        return f"{topic}, {grounder}"


def measure_group_agreement(
    candidates: Iterable[Candidate], judgements: Iterable[Judgement], groups: CandidateGroups
) -> dict[str, GroupAgreement]:
    """Measure the agreement in each group, in the order of the groups' names.

    candidates: in question order. judgements: one of each judge for each candidate, in the candidates' order. Raises
    InvalidInput if they do not match. Equal answers from one region count once, with their first scores.
    """
    centred: dict[str, _GroupRows] = defaultdict(_GroupRows)
    for siblings in _iter_siblings(_join_judgements(candidates, judgements)):
        rows = {normalize_text(candidate.text): scores for candidate, scores in reversed(siblings)}
        if len(rows) > 1:
            scores_AJ = np.array(list(rows.values()))  # answers x judges
            rows_of_group = centred[groups.get_group(siblings[0][0])]
            rows_of_group.texts += rows
            rows_of_group.scores += (scores_AJ - scores_AJ.mean(axis=0)).tolist()
    return {group: _measure_rows(rows_of_group) for group, rows_of_group in sorted(centred.items())}


@dataclass
class _GroupRows:
    """The answers of a group, with each judge's score minus its mean over the answers from the same region."""

    texts: list[str] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)  # answers x judges


def _iter_siblings(
    scored: Iterable[tuple[Candidate, tuple[float, ...]]],
) -> Iterator[list[tuple[Candidate, tuple[float, ...]]]]:
    """Candidates that answer the same question from the same region in the same context."""
    for _, of_question in groupby(scored, key=lambda pair: pair[0].question):
        by_situation: dict[tuple[object, ...], list[tuple[Candidate, tuple[float, ...]]]] = defaultdict(list)
        for candidate, scores in of_question:
            by_situation[candidate.step, candidate.parent, candidate.prompt, candidate.region].append(
                (candidate, scores)
            )
        yield from by_situation.values()


def _join_judgements(
    candidates: Iterable[Candidate], judgements: Iterable[Judgement]
) -> Iterator[tuple[Candidate, tuple[float, ...]]]:
    """Candidates with the scores of their judges, in the judges' order; without those that a judge did not score."""
    by_candidate = groupby(judgements, key=lambda judgement: judgement.candidate)
    for candidate in candidates:
        judged, group = next(by_candidate, ("nothing", iter(())))
        if judged != candidate.id:
            raise InvalidInput(
                f"expected judgements of {candidate.id}, got {judged}; they must be in the order of the candidates"
            )
        scores = [judgement.score for judgement in sorted(group, key=lambda judgement: judgement.judge)]
        known = tuple(score for score in scores if score is not None)
        if len(known) == len(scores):
            yield candidate, known


def _measure_rows(rows: _GroupRows) -> GroupAgreement:
    scores_AJ = np.asarray(rows.scores)
    count, judges = scores_AJ.shape
    if count < MIN_ANSWERS or judges < 2 or not np.all(scores_AJ.std(axis=0) > 0):
        return GroupAgreement(answers=count, correlation=None)
    correlation_JJ = np.corrcoef(scores_AJ, rowvar=False)
    values = [correlation_JJ[i, j] for i, j in combinations(range(judges), 2)]
    return GroupAgreement(
        answers=count,
        correlation=round(float(np.clip(np.mean(values), -1, 1)), 6),
        prejudice=_measure_prejudice(rows.texts, scores_AJ.mean(axis=1)),
    )


def _measure_prejudice(texts: Sequence[str], scores_A: npt.NDArray[np.float64]) -> float | None:
    """Variance between the answers' texts over the whole variance; None without variance."""
    total = float(np.mean((scores_A - scores_A.mean()) ** 2))
    if total == 0:
        return None
    between = 0.0
    for text in sorted(set(texts)):
        of_text = scores_A[[position for position, other in enumerate(texts) if other == text]]
        between += len(of_text) / len(texts) * float((of_text.mean() - scores_A.mean()) ** 2)
    return round(min(1.0, between / total), 6)
