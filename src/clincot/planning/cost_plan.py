"""The plan of rounds: counts, time, memory, storage, shards and cost, for one kind of GPU.

This is the project's only estimate: `clincot plan`, `clincot compare --dry-run`, preflight and the first lines of the
recipes print it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from clincot.batching import BLOCK_SIZE
from clincot.config import EngineConfig, Params, TrainConfig
from clincot.errors import InvalidInput
from clincot.planning.assumptions import Assumptions
from clincot.planning.counting_models import ENGINE_BATCH, ModelCalls, ReplyHabits
from clincot.planning.earlier_round import RoundHabits, read_round_habits
from clincot.planning.gpu_memory import (
    GIB,
    SHARE_USED,
    TrainingMethod,
    choose_method,
    estimate_serving,
    estimate_training,
)
from clincot.planning.gpu_table import Gpu
from clincot.planning.model_sizes import ModelSize
from clincot.planning.planned_models import PlannedModel, plan_checkpoint, plan_judge
from clincot.planning.round_counts import PairHabits, RoundCounter, RoundCounts, TrainingCount, count_evaluation
from clincot.planning.sampled_data import (
    SAMPLE,
    DataSize,
    RoundSplit,
    SampledData,
    open_benchmark_sample,
    open_sample,
)
from clincot.planning.stage_times import Engine, StageTime, TimeModel
from clincot.training.resolved_settings import LARGE_MODEL_LORA_R

GENERATION_STAGES = ("propose", "answer", "judge")
SHARDED_OVER = (1, 2, 4, 8)  # GPUs of one machine


@dataclass(frozen=True)
class PlanRequest:
    """What is planned, and for which GPU."""

    params: Params
    data: Path | DataSize
    benchmark: Path | DataSize
    gpu: Gpu
    policy: str = ""  # checkpoint folder; "": preflight.base of the recipe
    title: str = ""  # of the policy, if its checkpoint is not here
    rounds: int = 0  # 0: prepare.rounds
    seeds: int = 1
    comparisons: tuple[tuple[str, TrainConfig], ...] = ()  # further ways of training, by label
    assumptions: Assumptions = field(default_factory=Assumptions)
    like: Path | None = None  # folder of an earlier round, whose habits are assumed
    sample: int = SAMPLE
    gpus: tuple[Gpu, ...] = ()  # for the table of what fits; (): only `gpu`

    @property
    def round_count(self) -> int:
        return self.rounds or self.params.prepare.rounds


@dataclass(frozen=True)
class PlanRow:
    """One stage of a round, or the evaluation of the base policy."""

    stage: str
    model: str
    calls: ModelCalls
    time: StageTime | None  # None: not estimated, because the model's size is not known or there is none
    memory: float  # bytes on one GPU
    record_bytes: float

    @property
    def gpu_hours(self) -> float:
        return 0.0 if self.time is None else self.time.seconds / 3600


@dataclass(frozen=True)
class Fit:
    """On how many GPUs of a kind something fits; 0: on none of SHARDED_OVER that can share the pairs of a step."""

    gpu: str
    what: str
    gpus: int
    gib: float  # on each of them


@dataclass(frozen=True)
class CostPlan:
    """A plan; hours are GPU-hours."""

    request: PlanRequest
    policy: PlannedModel
    judges: tuple[PlannedModel, ...]
    data: SampledData
    benchmark: SampledData
    counts: RoundCounts
    rows: tuple[PlanRow, ...]  # of the first round
    base: PlanRow  # evaluation of the base policy, once for each seed
    fits: tuple[Fit, ...]
    checkpoint_bytes: float  # of one trained policy

    @property
    def round_hours(self) -> float:
        return sum(row.gpu_hours for row in self.rows)

    @property
    def round_share(self) -> float:
        """All rounds' questions as a multiple of the first round's."""
        return sum(self.data.rounds) / self.data.rounds[0]

    @property
    def total_hours(self) -> float:
        """All rounds and seeds. The benchmark is as large in every round, whatever the round's questions are."""
        rounds, asked, tested = self.request.round_count, 0.0, 0.0
        for row in self.rows:
            if row.stage == "evaluate":
                tested += row.gpu_hours
            else:
                asked += row.gpu_hours
        return self.request.seeds * (asked * self.round_share + tested * rounds + self.base.gpu_hours)

    @property
    def memory(self) -> float:
        """Bytes that a round needs on one GPU at most."""
        return max(row.memory for row in (*self.rows, self.base))

    @property
    def record_bytes(self) -> float:
        """Of all rounds and seeds."""
        of_round = sum(row.record_bytes for row in self.rows)
        return self.request.seeds * (of_round * self.round_share + self.base.record_bytes)

    @property
    def storage(self) -> dict[str, float]:
        """Bytes by what they hold, for all rounds and seeds."""
        models = [self.policy, *self.judges]
        weights = sum(2.0 * model.size.total for model in models if model.size is not None)
        policies = self.request.seeds * self.request.round_count * (1 + len(self.request.comparisons))
        return {
            "checkpoints of policy and judges": weights,
            f"{policies} trained checkpoints": policies * self.checkpoint_bytes,
            "records": self.record_bytes,
            "images": self.data.image_bytes,
        }

    @property
    def generation_hours(self) -> float:
        """Of one round: what shards divide."""
        return sum(row.gpu_hours for row in self.rows if row.stage in GENERATION_STAGES)

    @property
    def shards(self) -> int:
        """So many that none takes longer than assumed, and each has at least a block of questions."""
        wanted = math.ceil(self.generation_hours / self.request.assumptions.shard_hours)
        return max(1, min(wanted, math.ceil(self.data.rounds[0] / BLOCK_SIZE)))

    @property
    def cost(self) -> tuple[float, float] | None:
        """Lowest and highest USD; None without a price."""
        price = self.request.gpu.price
        return None if price is None else (price[0] * self.total_hours, price[1] * self.total_hours)


def make_plan(request: PlanRequest) -> CostPlan:
    """Count a round on a sample and estimate what it costs. Raises InvalidInput and UnsupportedCheckpoint."""
    if request.round_count < 1 or request.seeds < 1:
        raise InvalidInput(f"expected at least one round and seed, got {request.round_count} and {request.seeds}")
    params, assumed = request.params, request.assumptions
    prepare = params.prepare
    split = RoundSplit(
        request.round_count, max(prepare.rounds, request.round_count), limit=prepare.limit, seed=prepare.seed
    )
    habits = _find_habits(request)
    with ExitStack() as stack:
        data = stack.enter_context(open_sample(request.data, assumed, split, sample=request.sample))
        tested, benchmark = stack.enter_context(
            open_benchmark_sample(request.benchmark, assumed, limit=params.evaluate.limit, sample=request.sample)
        )
        images = {**data.by_image, **tested.by_image}
        checkpoint = request.policy or params.preflight.base
        policy = plan_checkpoint("policy", checkpoint, images, assumed, title=request.title)
        judges = tuple(plan_judge(spec, policy, images, assumed) for spec in params.judge.judges)
        counting = policy.build_counting_model(images, habits.replies)
        trains = (params.train, *(config for _, config in request.comparisons))
        counts = RoundCounter(
            params,
            data,
            counting,
            [judge.build_counting_model(images) for judge in judges],
            trains,
            habits.pairs,
            habits.regions,
        ).count_round()
        evaluation = count_evaluation(params, tested, benchmark, counting)
    assert policy.size is not None
    builder = _RowBuilder(request, policy.size, policy, judges)
    rows, base = builder.build_rows(counts, evaluation.calls, evaluation.record_bytes)
    return CostPlan(
        request=request,
        policy=policy,
        judges=judges,
        data=data,
        benchmark=tested,
        counts=counts,
        rows=rows,
        base=base,
        fits=tuple(_list_fits(request, policy.size, counts, rows)),
        checkpoint_bytes=float(policy.size.total * (4 if params.train.dtype == "float32" else 2)),
    )


def _find_habits(request: PlanRequest) -> RoundHabits:
    if request.like is not None:
        return read_round_habits(request.like, request.params)
    assumed = request.assumptions
    return RoundHabits(ReplyHabits(answer_share=assumed.answer_share, written_kept=assumed.written_kept), PairHabits())


@dataclass(frozen=True)
class _RowBuilder:
    """Turns counts into rows with time and memory."""

    request: PlanRequest
    size: ModelSize
    policy: PlannedModel
    judges: Sequence[PlannedModel]

    def build_rows(
        self, counts: RoundCounts, tested: ModelCalls, tested_bytes: float
    ) -> tuple[tuple[PlanRow, ...], PlanRow]:
        """(rows of a round, the base policy's evaluation)."""
        rows = [self._build_row(one.stage, one.model, one.calls, one.record_bytes) for one in counts.stages]
        labels = ("", *(label for label, _ in self.request.comparisons))
        for label, count, train in zip(labels, counts.training, self._trains, strict=True):
            rows.append(self._build_training_row(label, count, train))
        base = self._build_row("evaluate", "policy", tested, tested_bytes)
        rows += [
            PlanRow("evaluate", label or "policy", base.calls, base.time, base.memory, base.record_bytes)
            for label in labels
        ]
        return tuple(rows), base

    @property
    def _trains(self) -> tuple[TrainConfig, ...]:
        return (self.request.params.train, *(config for _, config in self.request.comparisons))

    def _build_row(self, stage: str, model: str, calls: ModelCalls, record_bytes: float) -> PlanRow:
        sizes = {judge.name: judge.size for judge in self.judges}
        size = sizes[model] if stage == "judge" else self.size
        if not calls.requests or size is None:
            return PlanRow(stage, model, calls, None, 0.0, record_bytes)
        engine = self._find_engine(stage)
        time = TimeModel(self.request.gpu, self.request.assumptions).time_calls(calls, size, engine)
        return PlanRow(stage, model, calls, time, self._estimate_memory(stage, calls, size, engine), record_bytes)

    def _find_engine(self, stage: str) -> Engine:
        config = self.request.params.get_stage_config(stage)
        engine: EngineConfig = getattr(config, "engine", EngineConfig())
        dtype = getattr(config, "dtype", "auto")
        return Engine(engine.kind, engine.vllm.concurrency, 4 if dtype == "float32" else 2)

    def _estimate_memory(self, stage: str, calls: ModelCalls, size: ModelSize, engine: Engine) -> float:
        """Bytes on the GPU. In this process the policy stays loaded while the judges, all at once, are asked."""
        if engine.kind == "vllm":
            share = self.request.params.models.vllm.gpu_memory_utilization
            return self.request.gpu.memory_gb * 1e9 * share
        if engine.kind == "url":
            return 0.0
        limit = {"answer": self.request.params.answer.batch_size, "judge": self.request.params.judge.batch_size}
        batch = min(limit.get(stage, ENGINE_BATCH), ENGINE_BATCH)
        own = estimate_serving(size, tokens=round(calls.longest), batch=batch, number_bytes=engine.number_bytes)
        if stage != "judge":
            return own.gib * GIB
        loaded = [judge.size.total for judge in self.judges if judge.size is not None]
        others = self.size.total + sum(loaded) - size.total
        return own.gib * GIB + others * engine.number_bytes

    def _build_training_row(self, label: str, count: TrainingCount, train: TrainConfig) -> PlanRow:
        time = TimeModel(self.request.gpu, self.request.assumptions).time_training(count, self.size, train)
        memory = estimate_training(self.size, train, tokens=round(count.epoch.longest))
        passes = count.epoch.scale(train.epochs)
        return PlanRow("train", label or "policy", passes, time if count.rows else None, memory.gib * GIB, 0.0)


def _list_fits(request: PlanRequest, size: ModelSize, counts: RoundCounts, rows: Sequence[PlanRow]) -> list[Fit]:
    """What fits into each GPU: generation with judges on one, training by the recipe, by LoRA and of all weights."""
    train, tokens = request.params.train, max(1, round(counts.training[0].epoch.longest))
    rank = train.lora_r or LARGE_MODEL_LORA_R
    wide = train.dtype == "float32"
    own = choose_method(size, train)
    others = (
        TrainingMethod(rank, bfloat16=True, four_bit=False),
        TrainingMethod(0, bfloat16=not wide, four_bit=False),
    )
    methods = {f"train: {own} (the recipe)": own}
    methods |= {f"train: {method}": method for method in others if method != own}
    inference = max((row.memory for row in rows if row.stage != "train"), default=0.0) / GIB
    fits = []
    for gpu in request.gpus or (request.gpu,):
        usable = gpu.memory_gib * SHARE_USED
        fits.append(Fit(gpu.name, "generate and judge", int(inference <= usable), inference))
        for what, method in methods.items():
            needed = 0.0
            found = 0
            for number in SHARDED_OVER:
                if train.batch_size % number:  # processes share a step's pairs evenly (training/distributed.py)
                    continue
                needed = estimate_training(size, train, tokens=tokens, method=method, gpus=number).gib
                if needed <= usable:
                    found = number
                    break
            fits.append(Fit(gpu.name, what, found, needed))
    return fits
