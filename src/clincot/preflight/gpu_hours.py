"""Estimates the GPU-hours of a comparison from its parameters, the policy's size and the number of questions.

A simple model with stated assumptions, for planning only. A forward pass of n tokens through N weights is 2 · N · n
floating-point operations (arXiv 2001.08361, section 2.1); a training step of a LoRA is 6 · N · n with gradient
checkpointing (forward, forward again, backward through frozen weights) and of full fine-tuning 8 · N · n. They are
divided by what an A100 with 80 GB computes in bfloat16 (312e12 a second: NVIDIA's data sheet) at an assumed
utilisation, which was not measured. Answers are counted at their maximum length, pairs at their maximum number, and
judges at the size of the policy. Loading models, reading images and waiting are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clincot.config import Params, PolicyFacts, ProposeConfig
from clincot.generation.grounders import list_windows

GPU = "A100 80 GB"
PEAK = 312e12  # operations a second in bfloat16
PREFILL_USE, DECODE_USE, TRAIN_USE = 0.4, 0.05, 0.35  # assumed shares of the peak
FINDINGS_PER_QUESTION = 1.15  # (image, finding) pairs of SLAKE's training set: 5,637 for 4,919 questions
_LOOK_WORDS, _QUESTION_WORDS, _REGION_WORDS = 40, 80, 24  # tokens of texts


@dataclass(frozen=True)
class Workload:
    """How much a comparison does."""

    questions: int  # of the training set
    benchmark: int  # questions of the benchmark
    rounds: int
    seeds: int
    trained: int = 3  # policies that each round trains: SFT, DPO and margin-DPO


@dataclass(frozen=True)
class StageCost:
    """Tokens and time of one kind of work, over all rounds and seeds."""

    stage: str
    passes: int  # conversations or crops that a model reads
    tokens: float
    gpu_hours: float


def estimate_costs(params: Params, policy: PolicyFacts, work: Workload) -> list[StageCost]:
    """The cost of each stage, in the order in which they run."""
    subsets = max(params.prepare.rounds, work.rounds)
    share = work.questions / subsets
    asked = (min(share, params.prepare.limit) if params.prepare.limit else share) * work.rounds * work.seeds
    regions = _count_regions(params.propose)
    answers = asked * regions * (params.answer.per_region + len(params.answer.steps) - 1)
    length = params.answer.max_new_tokens
    conversation = policy.image_tokens + policy.crop_tokens + _QUESTION_WORDS * 2
    pairs = asked * params.pair.per_question * params.train.epochs
    judged = answers * max(1, len(params.judge.judges))
    policies = 1 + work.trained * work.rounds
    tested = min(work.benchmark, params.evaluate.limit or work.benchmark) * work.seeds * policies
    counter = _Counter(policy)
    return [
        *_cost_regions(counter, "propose", params.propose, asked),
        counter.cost("answer", answers, conversation, length),
        counter.cost("judge", judged, conversation + length, 1),
        counter.cost_training(params, pairs * work.trained, conversation + length),
        *_cost_benchmark(counter, params, tested, conversation),
    ]


def sum_hours(costs: Sequence[StageCost]) -> float:
    return sum(cost.gpu_hours for cost in costs)


@dataclass(frozen=True)
class _Counter:
    policy: PolicyFacts

    def cost(self, stage: str, passes: float, read: float, written: float) -> StageCost:
        """Inference: tokens that are read at once, and tokens that are written one by one."""
        seconds = passes * 2 * self.policy.parameters * (read / PREFILL_USE + written / DECODE_USE) / PEAK
        return StageCost(stage, round(passes), passes * (read + written), seconds / 3600)

    def cost_training(self, params: Params, pairs: float, tokens: float) -> StageCost:
        """Training of pairs, whose two sides the reference reads as well; SFT is counted as if it had two sides too."""
        full = params.train.full_finetuning
        sides = 3 if params.train.image_pair_weight else 2
        operations = pairs * sides * tokens * self.policy.parameters * ((8 if full else 6) + 2)
        return StageCost("train", round(pairs), pairs * sides * tokens, operations / (PEAK * TRAIN_USE) / 3600)


def _count_regions(propose: ProposeConfig) -> int:
    return sum(propose.grounders.values()) + 1  # and the whole image


def count_looks(propose: ProposeConfig) -> float:
    """Crops that the policy looks at for a question to find its windows."""
    if "windows" not in propose.grounders:
        return 0
    windows = sum(len(list_windows(side, propose.window_stride)) for side in propose.window_sides)
    return windows * FINDINGS_PER_QUESTION


def _cost_regions(counter: _Counter, stage: str, propose: ProposeConfig, questions: float) -> list[StageCost]:
    looks = questions * count_looks(propose)
    written = questions * propose.grounders.get("written", 0)
    return [
        counter.cost(f"{stage}: windows", looks, counter.policy.crop_tokens + _LOOK_WORDS, 0),
        counter.cost(f"{stage}: written", written, counter.policy.image_tokens + _QUESTION_WORDS, _REGION_WORDS),
    ]


def _cost_benchmark(counter: _Counter, params: Params, tested: float, conversation: float) -> list[StageCost]:
    """Every arm answers each question once, the arm `served` once from each of its regions."""
    arms, length = params.evaluate.arms, params.evaluate.max_new_tokens
    costs = [counter.cost("evaluate: answers", tested * len([a for a in arms if a != "served"]), conversation, length)]
    if "served" in arms:
        costs += _cost_regions(counter, "evaluate: served", params.serve.propose, tested)
        served = tested * _count_regions(params.serve.propose)
        costs.append(counter.cost("evaluate: served answers", served, conversation, params.serve.max_new_tokens))
    if "windows" in arms:
        looks = tested * count_looks(params.evaluate.propose)
        costs.append(counter.cost("evaluate: windows", looks, counter.policy.crop_tokens + _LOOK_WORDS, 0))
    return costs
