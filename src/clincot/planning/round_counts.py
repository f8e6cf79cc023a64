"""Counts what the stages of a round ask of the models, by running their code with models that only count.

    propose     generation.regions.propose_regions
    answer      generation.candidates.answer_regions, once for each step of the chain
    judge       judging.panel.JudgePanel, after each step
    pair        preferences.pairs.make_pairs, with scores drawn at random
    train       the rows of these pairs (training.rows), one pass and the reference's
    evaluate    evaluation.evaluator.evaluate_policy, each greedy conversation once (models.reply_memory)

The http grounder is another server's work; its regions are drawn at random here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby

from clincot.batching import iter_blocks
from clincot.config import EvaluateConfig, JudgeConfig, Params, ProposeConfig, TrainConfig
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.evaluator import evaluate_policy
from clincot.generation.candidates import (
    GenerationRequest,
    answer_regions,
    plan_first_step,
    plan_next_step,
    render_step_question,
)
from clincot.generation.regions import build_grounders, propose_regions
from clincot.geometry import WHOLE_IMAGE
from clincot.judging.asking import JudgeRequest
from clincot.judging.panel import JudgePanel
from clincot.models.reply_memory import remember_replies
from clincot.planning.counting_models import CountingModel, ModelCalls
from clincot.planning.gpu_memory import count_pairs_in_pass
from clincot.planning.sampled_data import SampledData
from clincot.preferences.pairs import NoPairs, make_pairs
from clincot.records import Candidate, PanelScore, PreferencePair, Record, Region
from clincot.training.rows import SourceRecords, TrainingRow, build_anchor_rows, build_training_rows

_Answered = tuple[GenerationRequest, Candidate, float | None]  # a candidate with its request and its drawn score


@dataclass
class StageCount:
    """What one stage asks of one model in a round."""

    stage: str
    model: str  # "policy", or the name of a judge
    calls: ModelCalls
    record_bytes: float = 0.0  # of the records that the stage writes

    def scale(self, factor: float) -> StageCount:
        """The count for `factor` times as many questions."""
        return StageCount(self.stage, self.model, self.calls.scale(factor), self.record_bytes * factor)


@dataclass(frozen=True)
class TrainingCount:
    """What training asks for in a round."""

    rows: float  # pairs and anchors
    epoch: ModelCalls  # one pass over the rows
    sides: int  # sequences of a row


@dataclass(frozen=True)
class RoundCounts:
    """The work of one round, for all of its questions."""

    questions: float
    stages: list[StageCount]
    candidates: float
    pairs: float
    training: list[TrainingCount]  # one for each way of training


@dataclass(frozen=True)
class PairHabits:
    """How many pairs and anchors a question gives; None: as with scores drawn at random."""

    pairs_per_question: float | None = None
    anchors_per_question: float | None = None


@dataclass
class RoundCounter:
    """Counts one round of a recipe on sampled questions, and scales the counts to all of the first round's."""

    params: Params
    data: SampledData
    policy: CountingModel
    judges: Sequence[CountingModel]
    trains: Sequence[TrainConfig]  # the ways of training on the round's pairs, the recipe's own first
    habits: PairHabits = field(default_factory=PairHabits)
    regions: Mapping[str, Sequence[Region]] = field(default_factory=dict)  # by question, where a round has proposed

    def count_round(self) -> RoundCounts:
        """The counts of propose, answer, judge, pair and train."""
        regions = self._propose()
        stages = [self._close_stage("propose", self.policy, regions)]
        answer, judged = ModelCalls(), {judge.name: ModelCalls() for judge in self.judges}
        judgement_bytes = 0.0
        answered: list[_Answered] = []
        for step in range(len(self.params.answer.steps)):
            answered += self._answer(step, regions, answered)
            answered.sort(key=lambda one: self._positions[one[0].question.id])  # stable: steps stay in their order
            answer.add(self.policy.take_calls())
            judgement_bytes = self._judge(answered)  # all steps' candidates are judged again, in a file of their own
            for judge in self.judges:
                judged[judge.name].add(judge.take_calls())
        candidates = [candidate for _, candidate, _ in answered]
        stages.append(StageCount("answer", "policy", answer, _count_bytes(candidates)).scale(self.data.scale))
        for judge in self.judges:
            size = judgement_bytes / len(self.judges)
            stages.append(StageCount("judge", judge.name, judged[judge.name], size).scale(self.data.scale))
        pairs = self._pair(candidates)
        share = self._scale_pairs(len(pairs))
        training = [self._count_training(train, pairs, candidates, regions, share) for train in self.trains]
        pair_bytes = _count_bytes(pairs) * share
        stages.append(StageCount("pair", "", ModelCalls(), pair_bytes))
        return RoundCounts(
            questions=len(self.data.questions) * self.data.scale,
            stages=stages,
            candidates=len(candidates) * self.data.scale,
            pairs=len(pairs) * share,
            training=training,
        )

    @property
    def _positions(self) -> Mapping[str, int]:
        return {question.id: position for position, question in enumerate(self.data.questions)}

    def _propose(self) -> list[Region]:
        config = replace_http(self.params.propose)
        grounders = build_grounders(config, self.policy)
        data = self.data
        proposed: dict[str, Sequence[Region]] = {}
        for region in propose_regions(data.questions, data.studies, data.folder, grounders, config):
            proposed[region.question] = [*proposed.get(region.question, ()), region]
        return list(chain.from_iterable(self.regions.get(name, regions) for name, regions in proposed.items()))

    def _answer(self, step: int, regions: Sequence[Region], answered: Sequence[_Answered]) -> list[_Answered]:
        config, data = self.params.answer, self.data
        if step == 0:
            requests = list(plan_first_step(data.questions, data.studies, regions, per_region=config.per_region))
        else:
            requests = []
            for _, group in groupby(answered, key=lambda one: one[0].question.id):
                requests += plan_next_step(list(group), continue_from=config.continue_from)
        candidates = answer_regions(requests, data.folder, self.policy, config)
        draw = random.Random(f"scores {step}")
        return [(request, candidate, draw.random()) for request, candidate in zip(requests, candidates, strict=True)]

    def _judge(self, answered: Sequence[_Answered]) -> float:
        """Ask the judges about every candidate; return the bytes of their judgements."""
        if not self.judges:
            return 0.0
        steps = self.params.answer.steps
        requests = (
            JudgeRequest(
                candidate.id,
                request.study,
                render_step_question(steps[candidate.step], request.question),
                request.region.box,
                candidate.text,
                block,
                finding="" if request.region.box == WHOLE_IMAGE else request.region.hypothesis,
                cutout=request.region.cutout,
            )
            for block, (request, candidate, _) in iter_blocks(answered, lambda one: one[0].question.id)
        )
        panel = JudgePanel(self.judges, self._judge_config())
        return _count_bytes(panel.collect_judgements(requests, self.data.folder))

    def _judge_config(self) -> JudgeConfig:
        """The panel's settings; the quorum of judges that are not counted is not asked for."""
        config = self.params.judge
        return config.model_copy(update={"quorum": min(config.quorum, len(self.judges))})

    def _close_stage(self, stage: str, model: CountingModel, records: Sequence[Record]) -> StageCount:
        return StageCount(stage, "policy", model.take_calls(), _count_bytes(records)).scale(self.data.scale)

    def _pair(self, candidates: Sequence[Candidate]) -> list[PreferencePair]:
        draw = random.Random("pair scores")
        topics = {question.id: question.topic or question.kind for question in self.data.questions}
        scores = [PanelScore(candidate=c.id, score=draw.random(), spread=0.0, judges=1) for c in candidates]
        try:
            return make_pairs(candidates, scores, self.params.pair, topics=topics)[0]
        except NoPairs:
            return []

    def _scale_pairs(self, pairs: int) -> float:
        """By what the sample's pairs are multiplied."""
        if self.habits.pairs_per_question is None or not pairs:
            return self.data.scale
        return self.habits.pairs_per_question * len(self.data.questions) * self.data.scale / pairs

    def _count_training(
        self,
        config: TrainConfig,
        pairs: Sequence[PreferencePair],
        candidates: Sequence[Candidate],
        regions: Sequence[Region],
        share: float,
    ) -> TrainingCount:
        sources = SourceRecords(
            candidates={candidate.id: candidate for candidate in candidates},
            regions={region.id: region for region in regions},
            questions={question.id: question for question in self.data.questions},
            studies=self.data.studies,
        )
        rows = list(self._build_rows(pairs, sources, anchors=()))
        calls, count = self._count_rows(rows, config).scale(share), len(pairs) * share
        if config.anchors and config.loss != "sft":
            anchors = self._choose_anchors(config.anchors, pairs, candidates)
            anchor_rows = list(self._build_rows((), sources, anchors=anchors))
            wanted = self.habits.anchors_per_question
            factor = self.data.scale
            if wanted is not None and anchors:
                factor = wanted * len(self.data.questions) * self.data.scale / len(anchors)
            calls.add(self._count_rows(anchor_rows, config).scale(factor))
            count += len(anchors) * factor
        return TrainingCount(count, calls, count_sides(config))

    def _build_rows(
        self, pairs: Sequence[PreferencePair], sources: SourceRecords, *, anchors: Sequence[Candidate]
    ) -> Iterator[TrainingRow]:
        steps, views, folder = self.params.answer.steps, self.policy.views, self.data.folder
        yield from build_training_rows(pairs, sources, folder, views, steps=steps)
        yield from build_anchor_rows(anchors, sources, folder, views, steps=steps)

    def _choose_anchors(
        self, most: int, pairs: Sequence[PreferencePair], candidates: Sequence[Candidate]
    ) -> list[Candidate]:
        """Up to `most` candidates of the last step for each question without a pair, as training.rows does."""
        paired, last = {pair.question for pair in pairs}, len(self.params.answer.steps) - 1
        chosen: list[Candidate] = []
        for question, group in groupby(candidates, key=lambda candidate: candidate.question):
            by_region = {candidate.region: candidate for candidate in group if candidate.step == last}
            # without the scores, every question may be one that has no pair
            if question not in paired or self.habits.anchors_per_question is not None:
                chosen += list(by_region.values())[:most]
        return chosen

    def _count_rows(self, rows: Sequence[TrainingRow], config: TrainConfig) -> ModelCalls:
        if not rows:
            return ModelCalls()
        sides = count_sides(config)
        conversations = [[row.chosen, row.rejected, row.chosen][:sides] for row in rows]
        packed = self.policy.sharing.frames and config.freeze_vision and config.loss != "sft"
        return self.policy.count_rows(conversations, batch_size=count_pairs_in_pass(config), packed=packed)


def count_sides(config: TrainConfig) -> int:
    """Conversations of a training row: chosen, rejected, and chosen on a blanked crop."""
    if config.loss == "sft":
        return 1
    return 3 if config.image_pair_weight else 2


def count_evaluation(params: Params, data: SampledData, benchmark: Benchmark, policy: CountingModel) -> StageCount:
    """The benchmark's counts for one policy, for all of its questions."""
    config = params.get_stage_config("evaluate")
    assert isinstance(config, EvaluateConfig)
    serve = config.serve.model_copy(update={"propose": replace_http(config.serve.propose)})
    arms = tuple("random" if arm == "http" else arm for arm in config.arms)
    config = config.model_copy(update={"propose": replace_http(params.propose), "serve": serve, "arms": arms})
    outcomes = list(evaluate_policy(remember_replies(policy), benchmark, data.studies, data.folder, config))
    count = StageCount("evaluate", "policy", policy.take_calls(), _count_bytes(outcomes))
    return count.scale(data.scale)


def replace_http(config: ProposeConfig) -> ProposeConfig:
    """The configuration with random regions instead of those of a segmenter behind a URL."""
    if "http" not in config.grounders:
        return config
    grounders = {name: count for name, count in config.grounders.items() if name != "http"}
    grounders["random"] = grounders.get("random", 0) + config.grounders["http"]
    return config.model_copy(update={"grounders": grounders})


def _count_bytes(records: Iterable[Record]) -> float:
    """Bytes of the records as JSON Lines."""
    return float(sum(len(record.model_dump_json()) + 1 for record in records))
