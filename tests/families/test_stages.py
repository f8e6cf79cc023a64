"""The stages of a round on each family: propose, answer, judge and evaluate, by the same commands as for any model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from clincot.config import AnswerConfig, EvaluateConfig, JudgeConfig, JudgeSpec, PrepareConfig, ProposeConfig
from clincot.datasets.folder import StudyIndex
from clincot.geometry import box_from_xyxy
from clincot.jsonl import read_json, read_records
from clincot.models.load import load_policy, unload_models
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import finding_prompt
from clincot.records import Candidate, Judgement, Outcome, PanelScore, Question, Region
from clincot.stages.runner import run_stage
from tests.support import tiny
from tests.support.families import Family

SHAPES = ((128, 128), (64, 160), (200, 72))
PROPOSE = ProposeConfig(grounders={"windows": 2, "written": 1}, window_sides=(0.5,), hypotheses=2, dtype="float32")
ANSWER = AnswerConfig(max_new_tokens=4, batch_size=32, dtype="float32")
EVALUATE = EvaluateConfig(arms=("windows", "whole"), propose=PROPOSE, max_new_tokens=4, resamples=5, dtype="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three films of three shapes with two questions each."""
    return tiny.write_set(tmp_path_factory.mktemp("set") / "data", studies=3, shapes=SHAPES)


@pytest.fixture
def policy(checkpoint: Path) -> Iterator[VisionLanguageModel]:
    """The very model that the stages use."""
    yield load_policy(checkpoint, dtype="float32")
    unload_models()


@pytest.fixture
def out(data: Path, checkpoint: Path, policy: VisionLanguageModel, tmp_path: Path) -> Path:
    """A round's files up to the regions."""
    files = {"data": data, "questions": tmp_path / "questions.jsonl"}
    run_stage("prepare", PrepareConfig(rounds=1), {"data": data}, {"questions": files["questions"]})
    run_stage("propose", PROPOSE, {**files, "policy": checkpoint}, {"regions": tmp_path / "regions.jsonl"})
    return tmp_path


def run_answer(out: Path, data: Path, checkpoint: Path) -> list[Candidate]:
    inputs = {"data": data, "questions": out / "questions.jsonl", "regions": out / "regions.jsonl"}
    run_stage("answer", ANSWER, {**inputs, "policy": checkpoint}, {"candidates": out / "candidates.jsonl"})
    return list(read_records(out / "candidates.jsonl", Candidate))


def run_judge(out: Path, data: Path, checkpoint: Path) -> list[Judgement]:
    spec = JudgeSpec(name="judge", path=str(checkpoint))
    config = JudgeConfig(judges=(spec,), calibration="identity", quorum=1, dtype="float32")
    names = ("questions", "regions", "candidates")
    outputs = {name: out / f"{name}.jsonl" for name in ("judgements", "scores")}
    outputs["panel_report"] = out / "panel.report.json"
    run_stage("judge", config, {"data": data, **{name: out / f"{name}.jsonl" for name in names}}, outputs)
    return list(read_records(out / "judgements.jsonl", Judgement))


def run_evaluate(out: Path, data: Path, checkpoint: Path) -> list[Outcome]:
    outputs = {"outcomes": out / "outcomes.jsonl", "report": out / "report.json"}
    run_stage("evaluate", EVALUATE, {"benchmark": data, "policy": checkpoint}, outputs)
    return list(read_records(outputs["outcomes"], Outcome))


@contextmanager
def writing(policy: VisionLanguageModel, ids: list[int]) -> Iterator[None]:
    """While active, the policy writes these tokens and then the last of them again and again."""
    position = 0

    def count(_module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        nonlocal position
        ids = args[0] if args else kwargs["input_ids"]  # LLaVA-NeXT passes them by position
        position = 0 if ids.shape[1] > 1 else position + 1  # the first forward pass reads the prompt

    def force(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(output)
        logits[..., ids[min(position, len(ids) - 1)]] = 100.0
        return logits

    handles = [
        policy.model.model.register_forward_pre_hook(count, with_kwargs=True),
        policy.model.get_output_embeddings().register_forward_hook(force),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_every_question_gets_regions(out: Path, data: Path) -> None:
    """Two windows and the whole film, and a written region where the random policy wrote one."""
    questions = list(read_records(out / "questions.jsonl", Question))
    regions = list(read_records(out / "regions.jsonl", Region))
    assert len(questions) == 3 * 2
    for question in questions:
        grounders = [region.grounder for region in regions if region.question == question.id]
        assert grounders.count("windows") == 2
        assert grounders.count("whole") == 1
        assert set(grounders) <= {"windows", "written", "whole"}


def test_candidates_are_what_the_policy_wrote(
    out: Path, data: Path, checkpoint: Path, policy: VisionLanguageModel
) -> None:
    """A random policy ends where it drew an end token, and is cut off where it drew none."""
    candidates = run_answer(out, data, checkpoint)
    assert len(candidates) == len(list(read_records(out / "regions.jsonl", Region)))
    assert {candidate.policy for candidate in candidates} == {policy.digest}
    assert all(1 <= len(candidate.token_logprobs) <= ANSWER.max_new_tokens for candidate in candidates)
    assert all(logp <= 0 for candidate in candidates for logp in candidate.token_logprobs)


def test_a_candidate_ends_with_each_end_token(
    family: Family, out: Path, data: Path, checkpoint: Path, policy: VisionLanguageModel
) -> None:
    """The policy writes "yes" and an end token: two tokens a candidate, an answer without special tokens."""
    tokenizer = policy.encoder.tokenizer
    for token in family.end_tokens:
        (out / "candidates.jsonl.stage.json").unlink(missing_ok=True)  # else the stage is up to date
        with writing(policy, [policy.yes_no_ids[0][0], tokenizer.convert_tokens_to_ids(token)]):
            candidates = run_answer(out, data, checkpoint)
        assert {candidate.text.lower() for candidate in candidates} == {"yes"}, token
        assert {len(candidate.token_logprobs) for candidate in candidates} == {2}, token


def test_only_an_answer_without_an_end_is_off_format(
    family: Family, out: Path, data: Path, checkpoint: Path, policy: VisionLanguageModel
) -> None:
    """ "yes" to a closed question is in format if the turn ended, by whichever end token, and not if it was cut off."""
    closed = {q.id for q in read_records(out / "questions.jsonl", Question) if q.kind == "closed"}
    yes = policy.yes_no_ids[0][0]
    endings = [policy.encoder.tokenizer.convert_tokens_to_ids(token) for token in family.end_tokens]
    for tokens, off_format in [*(([yes, end], False) for end in endings), ([yes], True)]:
        (out / "outcomes.jsonl.stage.json").unlink(missing_ok=True)
        with writing(policy, tokens):
            outcomes = [outcome for outcome in run_evaluate(out, data, checkpoint) if outcome.question in closed]
        assert len(outcomes) == len(EVALUATE.arms) * len(closed)
        assert {outcome.off_format for outcome in outcomes} == {off_format}


def test_the_same_checkpoint_judges(out: Path, data: Path, checkpoint: Path, policy: VisionLanguageModel) -> None:
    """Every candidate has a probability, that of the judge's own forward pass, and no judge is left out."""
    candidates = run_answer(out, data, checkpoint)
    judgements = run_judge(out, data, checkpoint)
    assert [judgement.candidate for judgement in judgements] == [candidate.id for candidate in candidates]
    assert {judgement.judge for judgement in judgements} == {policy.digest}
    assert all(judgement.score is not None and 0 < judgement.score < 1 for judgement in judgements)
    scores = list(read_records(out / "scores.jsonl", PanelScore))
    assert len(scores) == len(candidates)
    assert read_json(out / "panel.report.json")["scored"] == len(candidates)


def test_inference_runs_in_bfloat16(checkpoint: Path, data: Path) -> None:
    """The type of GPUs, on the processor: pixels and features follow the weights, and P(yes) is near float32's."""
    model, exact = VisionLanguageModel(checkpoint, dtype="bfloat16"), VisionLanguageModel(checkpoint)
    study = next(iter(StudyIndex(data).values()))
    prompt = finding_prompt(study, data, model.views, finding="a nodule", box=box_from_xyxy((0.1, 0.1, 0.6, 0.7)))
    assert model.p_yes([prompt])[0] == pytest.approx(exact.p_yes([prompt])[0], abs=0.02)
    assert model.generate([prompt], max_new_tokens=3, temperature=0.0, seeds=[0])[0].token_logprobs
