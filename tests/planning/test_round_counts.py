"""What a round asks of the models, counted by running its code with models that only count, and checked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from clincot.config import Params, find_recipe
from clincot.errors import InvalidInput
from clincot.planning.assumptions import Assumptions, parse_assumptions
from clincot.planning.cost_plan import CostPlan, PlanRequest, PlanRow, make_plan
from clincot.planning.gpu_table import DEFAULT_GPU, read_gpus
from clincot.planning.plan_text import render_plan
from clincot.planning.sampled_data import DataSize
from clincot.training.distributed import ProcessGroup

MODEL = "models/llava-1.5-7b"  # 576 image tokens for every picture
ASSUMED = Assumptions(findings_per_question=1.0)


def plan(sections: dict[str, Any], *, questions: int = 40, images: int = 10, **fields: Any) -> CostPlan:
    """A plan for 40 questions about 10 images, all of them sampled, and a benchmark of 20 about 5."""
    base: dict[str, Any] = {
        "preflight": {"base": MODEL},
        "prepare": {"rounds": 1},
        "propose": {"grounders": {"random": 2}},
        "judge": {"judges": [{"name": "a", "path": "models/medgemma-4b"}], "quorum": 1},
        "evaluate": {"arms": ["whole"]},
        "decide": {"arm": "whole"},
    }
    request = PlanRequest(
        params=Params.model_validate({**base, **sections}),
        data=DataSize(questions, images),
        benchmark=DataSize(20, 5),
        gpu=read_gpus()[DEFAULT_GPU],
        assumptions=fields.pop("assumptions", ASSUMED),
        **fields,
    )
    return make_plan(request)


def find_row(made: CostPlan, stage: str) -> PlanRow:
    return next(row for row in made.rows if row.stage == stage)


def test_every_candidate_is_answered_and_judged_once() -> None:
    """Two random regions and the whole image: 40 · 3 answers, and as many judgements."""
    made = plan({})
    assert find_row(made, "propose").calls.requests == 0  # random regions ask no model
    assert find_row(made, "answer").calls.requests == 120
    assert find_row(made, "judge").calls.requests == 120
    assert made.counts.candidates == 120
    # each of 10 images, each of them as a crop, and 2 crops for each question, once
    assert find_row(made, "answer").calls.encodes == 10 + 10 + 80
    assert find_row(made, "answer").calls.image_tokens == 100 * 576


def test_common_beginnings_are_counted_once() -> None:
    """An image and its question stand before 3 regions: they are computed once for each of 40 questions.

    All prompts begin with an image of 576 tokens and go on with a crop of as many, so what is left is at least the 120
    crops and 10 images (a tree of 8,192 tokens has no room for all questions of an image), and at most the 120 crops,
    40 images and all words.
    """
    calls = find_row(plan({}), "answer").calls
    words = calls.prompt_tokens - 240 * 576
    assert (120 + 10) * 576 < calls.prefill_tokens < (120 + 40) * 576 + words
    assert calls.prefill_tokens <= calls.padded_tokens


def test_answers_are_counted_at_their_longest() -> None:
    """Of at most 16 tokens each; the prefill gives the first one, so a batch takes 15 steps."""
    answer = find_row(plan({"answer": {"max_new_tokens": 16, "batch_size": 40}}), "answer").calls
    assert answer.new_tokens == 120 * 16
    assert answer.decode_steps == 3 * 15
    assert answer.sampled_tokens == 120 * 16
    half = Assumptions(findings_per_question=1.0, answer_share=0.5)
    assert find_row(plan({"answer": {"max_new_tokens": 16}}, assumptions=half), "answer").calls.new_tokens == 120 * 8


def test_windows_look_once_for_each_image_and_finding() -> None:
    """Sides .25 and .5 at a stride of .75 are 5 x 5 and 3 x 3 windows; every question names a finding of its own."""
    looks = find_row(plan({"propose": {"grounders": {"windows": 2}}}), "propose").calls
    assert looks.requests == 40 * 34
    assert looks.encodes == 10 * 34  # the questions of an image look at the same windows


def test_written_regions_may_be_lost() -> None:
    """4 samples a question; if half of them are kept, 2 remain beside the whole image."""
    made = plan(
        {"propose": {"grounders": {"written": 4}}},
        assumptions=Assumptions(findings_per_question=1.0, written_kept=0.5),
    )
    assert find_row(made, "propose").calls.requests == 160
    assert made.counts.candidates == pytest.approx(40 * 3, rel=0.1)  # two drawn boxes may also be the same


def test_a_chain_answers_and_judges_its_steps_again() -> None:
    """3 regions, 2 steps: each of 3 candidates is continued, the best one also from the 2 other regions: 3 + 5.

    After the second step all 8 candidates are judged, after the first one 3.
    """
    made = plan({"answer": {"steps": ["What is seen? {question}", "{question}"]}})
    assert made.counts.candidates == 40 * 8
    assert find_row(made, "answer").calls.requests == 40 * 8
    assert find_row(made, "judge").calls.requests == 40 * (3 + 8)


def test_the_benchmark_asks_each_arm() -> None:
    """20 questions: whole, and the served answer from one random region and the whole image, which is asked once."""
    sections = {
        "evaluate": {"arms": ["whole", "served"]},
        "serve": {"propose": {"grounders": {"random": 1}}},
    }
    assert find_row(plan(sections), "evaluate").calls.requests == 20 * 2


def test_a_segmenter_behind_a_url_costs_no_gpu_here() -> None:
    made = plan({"propose": {"grounders": {"http": 2}, "http_url": "http://127.0.0.1:1/ground"}})
    assert find_row(made, "propose").calls.requests == 0
    assert made.counts.candidates == 120


def test_a_judge_behind_a_url_is_counted_without_hours() -> None:
    made = plan({"judge": {"judges": [{"name": "far", "url": "http://127.0.0.1:1/v1", "model": "m"}], "quorum": 1}})
    judge = find_row(made, "judge")
    assert judge.calls.requests == 120
    assert judge.time is None
    assert "| judge                 | far    | 120      |" in render_plan(made)
    assert "not known" in render_plan(made)


def test_pairs_are_trained_from_both_sides() -> None:
    """2 pairs of 3 candidates a question; a pass over a pair reads two conversations, each with image and crop."""
    made = plan({"pair": {"per_question": 2, "same_region_share": 1.0, "length_auc_tolerance": 0.5, "min_gap": 0.001}})
    train = made.counts.training[0]
    assert made.counts.pairs == train.rows
    assert 60 <= train.rows <= 80  # drawn scores may be nearly equal
    assert train.epoch.encodes == train.rows * 4


def test_rounds_share_the_questions_and_test_all_of_the_benchmark() -> None:
    """4 rounds of 10 questions instead of one of 40: the same answers in all, 5 evaluations instead of 2."""
    one, four = plan({}), plan({"prepare": {"rounds": 4}})
    assert four.data.rounds == (10, 10, 10, 10)
    asked = [
        made.round_share * sum(row.gpu_hours for row in made.rows if row.stage in ("answer", "judge"))
        for made in (one, four)
    ]
    assert asked[1] == pytest.approx(asked[0], rel=0.02)  # the batches of 10 questions are less full
    tested = four.base.gpu_hours
    assert four.total_hours == pytest.approx(4 * sum(row.gpu_hours for row in four.rows) + tested)


def test_seeds_multiply_everything() -> None:
    once, thrice = plan({}), plan({}, seeds=3)
    assert thrice.total_hours == pytest.approx(3 * once.total_hours)
    assert thrice.record_bytes == pytest.approx(3 * once.record_bytes)


def test_a_sample_stands_for_the_whole_set() -> None:
    """A tenth of 1,000 questions, with whole images, gives the counts of all of them within 2 %.

    Pairs are as random as the scores from which they are made, and dropped to balance lengths: within 20 %.
    """
    sampled, whole = (plan({}, questions=1000, images=100, sample=sample) for sample in (100, 1000))
    assert len(sampled.data.questions) == 100
    for row, full in zip(sampled.rows, whole.rows, strict=True):
        near = 0.2 if row.stage == "train" else 0.02
        assert row.calls.requests == pytest.approx(full.calls.requests, rel=near), row.stage
        assert row.calls.prompt_tokens == pytest.approx(full.calls.prompt_tokens, rel=near), row.stage


def test_shards_are_as_many_as_the_hours_ask_for() -> None:
    """At most a block of 64 questions each: 640 questions are at most 10 shards."""
    short = Assumptions(findings_per_question=1.0, shard_hours=0.01)
    made = plan({}, questions=640, images=160, assumptions=short)
    assert made.shards == min(10, -(-made.generation_hours // 0.01))
    assert plan({}, assumptions=Assumptions(shard_hours=100)).shards == 1


def test_the_plan_is_the_same_each_time() -> None:
    assert render_plan(plan({"propose": {"grounders": {"windows": 1, "written": 2}}})) == render_plan(
        plan({"propose": {"grounders": {"windows": 1, "written": 2}}})
    )


def test_a_judge_of_unknown_size_is_named() -> None:
    sections = {"judge": {"judges": [{"name": "mine", "path": "models/mine"}], "quorum": 1}}
    with pytest.raises(InvalidInput, match=r"mine: models/mine is no folder with a config\.json, and none of the publ"):
        plan(sections)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("speed=3", "no assumption is called 'speed'; there are prefill_utilization"),
        ("answer_share=half", "expected a number, got 'half'"),
        ("answer_share=2", "expected 0 to 1, got 2"),
    ],
)
def test_a_bad_assumption_is_refused(word: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_assumptions([word])


def test_an_assumption_that_was_set_says_so() -> None:
    rows = {name: (value, source) for name, value, _, source in parse_assumptions(["answer_share=0.25"]).describe()}
    assert rows["answer_share"] == (0.25, "set (--assume)")
    assert "set" not in rows["prefill_utilization"][1]


def test_full_finetuning_needs_shards_where_a_lora_does_not() -> None:
    """7.06e9 weights: 18 bytes each for all of them are 118 GiB; the usable part of 80e9 bytes is 67 GiB."""
    recipe = find_recipe("uv-cot")
    fits = {
        fit.what: fit
        for fit in make_plan(
            PlanRequest(recipe.params, DataSize(40, 10), DataSize(20, 5), read_gpus()[DEFAULT_GPU])
        ).fits
    }
    assert fits["train: full fine-tuning, bfloat16 (the recipe)"].gpus == 2
    assert fits["train: LoRA of rank 128, bfloat16"].gpus == 1


@pytest.mark.parametrize(("batch_size", "gpus"), [(2, 2), (8, 4), (1, 0)])
def test_shards_share_the_pairs_of_a_step(batch_size: int, gpus: int) -> None:
    """Training refuses a batch that its processes cannot share evenly, so a step of one pair fits on no two GPUs.

    Eight pairs are four on each of two GPUs, whose activations need two more.
    """
    recipe = find_recipe("clincot-code")
    assert recipe.params.train.batch_size == 2
    train = recipe.params.train.model_copy(update={"batch_size": batch_size})
    params = recipe.params.model_copy(update={"train": train})
    plan = make_plan(PlanRequest(params, DataSize(40, 10), DataSize(20, 5), read_gpus()[DEFAULT_GPU]))
    assert {fit.what: fit.gpus for fit in plan.fits}["train: full fine-tuning, bfloat16 (the recipe)"] == gpus
    if gpus:
        assert ProcessGroup(rank=0, size=gpus).per_process_batch(batch_size) == batch_size // gpus
    else:
        with pytest.raises(InvalidInput, match=r"train.batch_size is 1, which 2 processes cannot share evenly"):
            ProcessGroup(rank=0, size=2).per_process_batch(batch_size)
