"""Stages whose models are behind a server: what is recorded, what is kept when the server ends, what a rerun asks.

The stages, the processes and the HTTP between them are real; instead of vLLM a stand-in answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clincot.config import EngineConfig, FrozenConfig, load_params
from clincot.errors import EngineFailed, InvalidInput
from clincot.jsonl import read_records
from clincot.models import served_checkpoint
from clincot.models.checkpoint import hash_checkpoint
from clincot.models.protocols import Generation
from clincot.models.reply_log import ReplyLog, hash_request
from clincot.models.rollout_engines import free_models
from clincot.models.served_checkpoint import ServedCheckpoint, sort_by_prefix
from clincot.prompts import Conversation, ImageView, Turn
from clincot.records import Candidate, Judgement, Outcome
from clincot.stages.runner import run_stage
from tests.support import tiny
from tests.support.chat_endpoint import asked, chat, completion
from tests.support.http_server import Reply, Request, serving
from tests.support.vllm_command import install_stand_in, is_gone, read_pids

SETTINGS = (
    "propose.grounders={random: 2}",
    "answer.temperature=0",
    "answer.per_region=1",
    "answer.batch_size=8",
    "models.engine=vllm",
    "models.vllm.concurrency=2",
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("served") / "policy", seed=0)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has no tokenizer, so its token ids are not compared."""
    monkeypatch.setattr(served_checkpoint, "CHECKED_PROMPTS", 0)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    install_stand_in(tmp_path, monkeypatch)
    monkeypatch.setenv("STAND_IN_PIDS", str(tmp_path / "pids"))
    yield tmp_path / "pids"
    free_models()


def configure(stage: str, *changes: str) -> FrozenConfig:
    return load_params(None, (*SETTINGS, *changes)).get_stage_config(stage)


def run_until_answers(folder: Path, policy: Path, *changes: str) -> list[Candidate]:
    """The stages propose and answer on six films with two questions each, from three regions: 36 candidates."""
    data = folder / "data"
    if not data.exists():
        tiny.write_set(data)
    inputs = {"data": data, "questions": data / "questions.jsonl", "policy": policy}
    regions, candidates = folder / "regions.jsonl", folder / "candidates.jsonl"
    run_stage("propose", configure("propose", *changes), inputs, {"regions": regions})
    run_stage("answer", configure("answer", *changes), {**inputs, "regions": regions}, {"candidates": candidates})
    return list(read_records(candidates, Candidate))


def test_records_name_the_checkpoint_and_not_the_server(
    tmp_path: Path, policy: Path, vllm: Path, unchecked: None
) -> None:
    """As in this process: the policy's digest, one candidate a region. Both stages share one server."""
    candidates = run_until_answers(tmp_path, policy)
    assert len(candidates) == 36
    assert {candidate.policy for candidate in candidates} == {hash_checkpoint(policy)}
    assert {candidate.text for candidate in candidates} == {"yes", "no"}
    assert not (tmp_path / ".candidates.jsonl.progress").exists()
    stamp = json.loads((tmp_path / "candidates.jsonl.stage.json").read_text())
    assert stamp["metrics"] == {"candidates": 36, "prompt_tokens": 3600, "prompt_tokens_cached": 2700}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [("dies:20", r"ended \(status 1\)"), ("memory:20", "out of memory: torch.OutOfMemoryError: CUDA out of memory")],
)
def test_what_a_dead_server_has_answered_is_not_asked_again(
    tmp_path: Path,
    policy: Path,
    vllm: Path,
    unchecked: None,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    reason: str,
) -> None:
    """The server ends after 20 replies. The stage says why; a rerun asks the 16 others and gives the same records."""
    expected = run_until_answers(tmp_path, policy)
    (tmp_path / "candidates.jsonl").unlink()
    free_models()
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    with pytest.raises(EngineFailed, match=f"{reason}.*Replies so far are kept"):
        run_until_answers(tmp_path, policy)
    kept = (tmp_path / ".candidates.jsonl.progress").read_bytes().splitlines()[1:]
    assert 19 <= len(kept) <= 20  # the 20th reply can be lost on its way
    monkeypatch.setenv("STAND_IN_FAULT", "")
    assert run_until_answers(tmp_path, policy) == expected
    stamp = json.loads((tmp_path / "candidates.jsonl.stage.json").read_text())
    assert stamp["metrics"]["prompt_tokens"] == 100 * (36 - len(kept))


@pytest.mark.slow
def test_a_judge_whose_server_dies_ends_the_stage(
    tmp_path: Path, policy: Path, vllm: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A panel of two with quorum 1 could go on without it, but its scores would be those of another panel."""
    other = tiny.write_model(tmp_path / "other", seed=1)
    run_until_answers(tmp_path, policy)
    judges = f"judge.judges=[{{name: a, path: '{policy}'}}, {{name: b, path: '{other}'}}]"
    config = configure("judge", judges, "judge.quorum=1", "judge.calibration=identity", "judge.batch_size=8")
    inputs = {"data": tmp_path / "data", "questions": tmp_path / "data" / "questions.jsonl"}
    inputs |= {name: tmp_path / f"{name}.jsonl" for name in ("regions", "candidates")}
    outputs = {"judgements": tmp_path / "j.jsonl", "scores": tmp_path / "s.jsonl", "panel_report": tmp_path / "p.json"}
    monkeypatch.setenv("STAND_IN_FAULT", "dies:20")
    with pytest.raises(EngineFailed, match="Replies so far are kept"):
        run_stage("judge", config, inputs, outputs)
    kept = len((tmp_path / ".j.jsonl.progress").read_bytes().splitlines()) - 1
    monkeypatch.setenv("STAND_IN_FAULT", "")
    metrics = run_stage("judge", config, inputs, outputs)
    assert metrics["prompt_tokens"] == 100 * (72 - kept)  # two judges, 36 candidates
    judges_found = {judgement.judge for judgement in read_records(outputs["judgements"], Judgement)}
    assert judges_found == {hash_checkpoint(policy), hash_checkpoint(other)}


def test_open_answers_are_graded_after_the_policys_server_has_ended(
    tmp_path: Path, policy: Path, vllm: Path, unchecked: None
) -> None:
    """The judges may be large. Six questions of the benchmark are open."""
    benchmark = tiny.write_set(tmp_path / "benchmark")
    judge, servers_gone = chat(completion("Yes", {"Yes": -0.1, "No": -2.4})), []

    def grade(request: Request) -> Reply:
        servers_gone.append(all(map(is_gone, read_pids(vllm))))
        return judge(request)

    outputs = {"outcomes": tmp_path / "outcomes.jsonl", "report": tmp_path / "report.json"}
    with serving(grade) as server:
        grader = f"evaluate.open_judges=[{{name: g, url: '{server.url}/v1', text_only: true}}]"
        config = configure("evaluate", grader, "evaluate.arms=[whole]", "decide.arm=whole", "evaluate.resamples=20")
        run_stage("evaluate", config, {"benchmark": benchmark, "policy": policy}, outputs)
    assert servers_gone
    assert all(servers_gone)
    graded = [outcome for outcome in read_records(outputs["outcomes"], Outcome) if outcome.graders]
    assert len(graded) == 6


def test_a_server_with_other_token_ids_is_refused(
    tmp_path: Path, policy: Path, vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token more than the processor makes, as of a chat template that writes <s> where the processor does, too."""
    monkeypatch.setenv("STAND_IN_IDS", "[1, 2, 3]")
    with pytest.raises(EngineFailed, match=r"makes 3 token ids of a prompt, which are not the .* own processor"):
        run_until_answers(tmp_path, policy)


def answer_as_vllm(ids: list[int] | None) -> Any:
    """A server of one model that reports these token ids where they are asked for."""

    def reply(request: Request) -> Reply:
        if request.path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "pinned", "object": "model"}]}
        token = {"token": "yes", "logprob": -0.5, "top_logprobs": []}
        choice = {"message": {"role": "assistant", "content": "yes"}, "logprobs": {"content": [token]}}
        given = ids if request.body.get("return_token_ids") else None
        return 200, {"choices": [{**choice, "finish_reason": "stop"}], "prompt_token_ids": given}

    return reply


def test_the_first_prompts_are_compared_and_every_control_word(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are compared here instead of 32. "<image>" in a question is text, which a server could take for a picture."""
    monkeypatch.setattr(served_checkpoint, "CHECKED_PROMPTS", 2)
    with serving(answer_as_vllm(None)) as server:
        engine = EngineConfig(kind="url", url=f"{server.url}/v1", model="pinned")
        model = ServedCheckpoint(policy, engine)
        word = model.encoder.placeholder
        for text in ("Is there a nodule?", "an effusion?", "a fracture?", f"What is {word}?"):
            model.generate([asked(text)], max_new_tokens=4, temperature=0.0, seeds=[0])
        bodies = [request.body for request in server.requests if request.body]
    assert ["return_token_ids" in body for body in bodies] == [True, True, False, True]
    assert all(body["stop_token_ids"] == sorted(model.encoder.end_ids) for body in bodies)


def test_an_endpoint_with_the_processors_ids_is_taken(policy: Path) -> None:
    """And with others it is refused, like a server of the stage's own."""
    encoder = served_checkpoint.load_encoder(str(policy))
    ids = list(encoder.encode(asked("Right?"), reply=True).ids)
    with serving(answer_as_vllm(ids)) as server:
        engine = EngineConfig(kind="url", url=f"{server.url}/v1", model="pinned")
        reply = ServedCheckpoint(policy, engine).generate([asked("Right?")], max_new_tokens=4, temperature=0, seeds=[0])
        assert reply == [Generation("yes", (-0.5,))]
        with pytest.raises(EngineFailed, match=f"makes {len(ids)} token ids"):
            ServedCheckpoint(policy, engine).generate([asked("Wrong?")], max_new_tokens=4, temperature=0, seeds=[0])


def test_an_endpoint_of_another_checkpoint_is_refused_by_its_name(policy: Path) -> None:
    """Without models.model the served name is the beginning of the digest, so last round's weights are noticed."""

    def reply(request: Request) -> Reply:
        if request.path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "000000000000", "object": "model"}]}
        return 404, {"error": {"message": f"The model `{request.body['model']}` does not exist."}}

    with serving(reply) as server:
        model = ServedCheckpoint(policy, EngineConfig(kind="url", url=f"{server.url}/v1"))
        with pytest.raises(Exception, match=rf"the endpoint lists \['000000000000'\], not '{model.digest[:12]}'"):
            model.generate([asked("Right?")], max_new_tokens=4, temperature=0.0, seeds=[0])


def test_relevance_maps_need_the_policy_in_this_process(
    tmp_path: Path, policy: Path, vllm: Path, unchecked: None
) -> None:
    with pytest.raises(InvalidInput, match=r"set models.engine to transformers for this stage"):
        run_until_answers(tmp_path, policy, "propose.grounders={relevance: 1}")


def test_stages_choose_their_engines_apart() -> None:
    """`engines` names exceptions; a judge's endpoint is its own url, so the engine url leaves judges where they are."""
    params = load_params(None, ("models.engine=vllm", "models.engines={judge: transformers}"))
    kinds = {s: params.get_stage_config(s).engine.kind for s in ("propose", "answer", "judge", "evaluate")}  # type: ignore[attr-defined]
    assert kinds == {"propose": "vllm", "answer": "vllm", "judge": "transformers", "evaluate": "vllm"}
    with pytest.raises(InvalidInput, match=r"the engine of answer is url, but models.url is empty"):
        load_params(None, ("models.engine=url",)).get_stage_config("answer")
    by_url = load_params(None, ("models.engine=url", "models.url=http://h/v1"))
    assert by_url.get_stage_config("answer").engine.url == "http://h/v1"  # type: ignore[attr-defined]
    assert by_url.get_stage_config("judge").engine == EngineConfig()  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", ["propose", "answer", "judge", "evaluate"])
def test_without_an_engine_a_sections_digest_stays(stage: str) -> None:
    """The field is left out, so stamps and caches of earlier runs hold; with vLLM it is part of the section."""
    section = load_params(None).get_stage_config(stage)
    assert "engine" not in section.model_dump(mode="json")
    served = load_params(None, ("models.engine=vllm",)).get_stage_config(stage)
    content = served.model_dump(mode="json")
    assert content["engine"]["kind"] == "vllm"
    assert type(served).model_validate(content) == served  # as a task of a pipeline reads it


def show(path: str, question: str, *later: str) -> Conversation:
    picture = ImageView(path, path)
    return (Turn("user", question, (picture,)), *(Turn("user", text) for text in later))


def test_prompts_that_begin_alike_are_sent_one_after_the_other() -> None:
    """Two films, two questions, two regions, shuffled: first by film, then by question."""
    asked_in_turn = [
        show("b.png", "effusion?", "left"),
        show("a.png", "nodule?", "left"),
        show("b.png", "effusion?", "right"),
        show("a.png", "effusion?", "left"),
        show("a.png", "nodule?", "right"),
    ]
    assert sort_by_prefix(asked_in_turn) == [3, 1, 4, 0, 2]


def test_a_log_is_of_one_stage_and_loses_a_torn_line_only(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = ReplyLog(path, "key")
    log.add("one", ["yes", 1])
    log.add("two", ["no", 2])
    log.close(complete=False)
    path.write_bytes(path.read_bytes()[:-4])
    again = ReplyLog(path, "key")
    assert (again.get("one"), again.get("two")) == (["yes", 1], None)
    again.add("three", [])
    again.close(complete=False)
    assert len(ReplyLog(path, "key")) == 2
    assert len(ReplyLog(path, "another key")) == 0


def test_a_request_is_known_by_the_content_of_its_pictures() -> None:
    here, moved, changed = (Turn("user", "?", (ImageView(path, sha),)) for path, sha in ("ax", "bx", "ay"))
    assert hash_request((here,), [1]) == hash_request((moved,), [1])
    assert len({hash_request((turn,), [n]) for turn, n in ((here, 1), (changed, 1), (here, 2))}) == 3
