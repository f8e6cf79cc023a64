"""The cluster shape for real: the same answers as embedded, from checkpoint and adapter, with the prefix cached."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from clincot.datasets.folder import StudyIndex
from clincot.generation.grounders import WindowGrounder
from clincot.models.encoding import ConversationEncoder
from clincot.models.endpoint import EndpointModel
from clincot.models.vlm import VisionLanguageModel
from clincot.models.yes_no import read_yes_no_ids
from clincot.prompts import ChainStep, Conversation, chain_prompt, finding_prompt, load_prompt_format, region_prompt
from tests.serving.conftest import POLICY
from tests.serving_vllm.conftest import BLOCK, Vllm
from tests.support import tiny
from tests.support.model_servers import CHAT, PREDICT, Served, chat, data_uri, v1

QUESTIONS = ("Is there a nodule in the left lung?", "Is there an effusion?", "Which zone is the nodule in?")
TIE = 1e-4  # nats: two tokens, or two places, that are nearer to each other may come in either order


def prediction(server: Served, question: str, image: str) -> dict[str, Any]:
    reply = httpx.post(server.url + PREDICT, json=v1(question, image), timeout=900)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["predictions"][0]
    return found


def differs(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Why two chains are not the same; "" where they are, or where a tie lets them differ."""
    if len(one["regions"]) != len(other["regions"]):
        return f"{len(one['regions'])} and {len(other['regions'])} regions"
    for a, b in zip(one["regions"], other["regions"], strict=True):
        if a["box"] != b["box"] and abs(a["found"] - b["found"]) > TIE:  # else two places that score the same
            return f"{a['grounder']} looked at {a['box']} and {b['box']}"
        if a["box"] == b["box"] and (a["answer"] != b["answer"] or abs(a["likelihood"] - b["likelihood"]) > 1e-3):
            return f"{a['answer']!r} ({a['likelihood']}) and {b['answer']!r} ({b['likelihood']}) from one place"
    if one["answer"] != other["answer"] and abs(one["confidence"] - other["confidence"]) > TIE:
        return f"{one['answer']!r} and {other['answer']!r}"
    return ""


def test_both_shapes_answer_alike(transformer: Served, embedded: Served, films: Path) -> None:
    """18 questions through regions, crops and answers; at least two different answers among them."""
    answers, odd = set(), []
    for number, question in itertools.product(range(6), QUESTIONS):
        image = data_uri(films / "images" / f"{number}.png")
        one, other = prediction(embedded, question, image), prediction(transformer, question, image)
        answers.add(one["answer"])
        if why := differs(one, other):
            odd.append(f"film {number}, {question!r}: {why}")
    assert odd == []
    assert len(answers) > 1


def test_both_shapes_count_the_same_tokens(transformer: Served, embedded: Served, films: Path) -> None:
    """Those of vLLM's usage, and those of the encoder here; the greedy answers are the same."""
    image = data_uri(films / "images" / "0.png")
    used = []
    for server in (embedded, transformer):
        reply = httpx.post(server.url + CHAT, json=chat(QUESTIONS[0], image), timeout=900).json()
        used.append(reply["usage"])
    assert used[0] == used[1]
    assert used[0]["prompt_tokens"] > 100
    assert used[0]["completion_tokens"] >= 2


def conversations(films: Path) -> list[Conversation]:
    views = load_prompt_format(POLICY)
    made = []
    for study in StudyIndex(films).values():
        made.append(region_prompt(study, films, views, QUESTIONS[0]))
        made += [
            chain_prompt(study, films, views, [ChainStep(question, box_of_corner(), False)]) for question in QUESTIONS
        ]
    return made


def box_of_corner() -> Any:
    from clincot.geometry import box_from_xyxy

    return box_from_xyxy((0.0, 0.25, 0.5, 0.75))


@pytest.mark.parametrize("model", ["policy", "tuned"])
def test_greedy_tokens_and_their_log_probabilities_agree(
    vllm: Vllm, adapter: tuple[Path, Path], films: Path, model: str
) -> None:
    """`tuned` is the adapter on its base in vLLM, and merged into the weights here."""
    here = VisionLanguageModel(POLICY if model == "policy" else adapter[1])
    there = EndpointModel(f"http://{vllm.host}/v1", model=model, views=load_prompt_format(POLICY))
    asked = conversations(films)
    seeds = [0] * len(asked)
    one = here.generate(asked, max_new_tokens=8, temperature=0.0, seeds=seeds)
    other = there.generate(asked, max_new_tokens=8, temperature=0.0, seeds=seeds)
    assert [o.text for o in other] == [o.text for o in one]
    for a, b in zip(one, other, strict=True):
        assert b.token_logprobs == pytest.approx(a.token_logprobs, abs=1e-3)


def test_windows_are_scored_alike_however_unlikely_yes_or_no_is(vllm: Vllm, films: Path) -> None:
    """Of the 20 likeliest tokens alone, P(yes) is another where "no" is none of them. How far off that is depends on
    the policy (printed); asked for by name the two tokens are there whatever the policy thinks of them."""
    here = VisionLanguageModel(POLICY)
    boxes = WindowGrounder(here, sides=(0.25, 0.5), stride=0.5).boxes
    windows = [
        finding_prompt(study, films, here.views, finding=finding, box=box)
        for study, finding in zip(
            StudyIndex(films).values(), ("a nodule", "an effusion", "a pneumothorax"), strict=False
        )
        for box in boxes
    ]
    one = here.p_yes(windows)
    named, likeliest = (
        EndpointModel(f"http://{vllm.host}/v1", model="policy", views=here.views, yes_no=ids).p_yes(windows)
        for ids in (read_yes_no_ids(POLICY), ())
    )
    off = [difference(one, other) for other in (named, likeliest)]
    print(f"P(yes) of {len(windows)} windows: off by {off[0]:.1e} at most, of the 20 likeliest tokens by {off[1]:.1e}")
    assert off[0] < 2e-4
    assert off[0] <= off[1]


def difference(one: Sequence[float | None], other: Sequence[float | None]) -> float:
    """The largest; a score that only one of them has counts 1."""
    return max(float(a is not b) if a is None or b is None else abs(a - b) for a, b in zip(one, other, strict=True))


def test_the_adapter_is_heard(adapter: tuple[Path, Path], films: Path) -> None:
    """Else the test above would compare the base with itself."""
    asked = conversations(films)
    base, tuned = (VisionLanguageModel(p).p_yes(asked) for p in (POLICY, adapter[1]))
    assert max(abs(a - b) for a, b in zip(base, tuned, strict=True) if a is not None and b is not None) > 0.01


def test_the_second_turn_finds_image_and_question_in_the_prefix_cache(vllm: Vllm, tmp_path: Path) -> None:
    """From vLLM's own counters: of the second turn's tokens, all full blocks of the first turn are hits."""
    views, encoder = load_prompt_format(POLICY), ConversationEncoder(VisionLanguageModel(POLICY).encoder.processor)
    there = EndpointModel(f"http://{vllm.host}/v1", model="policy", views=views)
    question = "Is there a nodule in the upper zone of the right lung, and does it look calcified?"
    films = tiny.write_set(tmp_path / "films", studies=1, seed=7)  # nobody has asked about this one
    study = next(iter(StudyIndex(films).values()))
    opening = region_prompt(study, films, views, question)

    def hits(conversation: Conversation) -> float:
        before = vllm.metric("vllm:prefix_cache_hits_total")
        there.generate([conversation], max_new_tokens=4, temperature=0.0, seeds=[0])
        return vllm.metric("vllm:prefix_cache_hits_total") - before

    assert hits(opening) == 0
    tokens = len(encoder.encode(opening).ids)
    assert tokens >= 2 * BLOCK
    second = chain_prompt(study, films, views, [ChainStep(question, box_of_corner(), False)])
    found = hits(second)
    print(f"second turn: {found:.0f} of {len(encoder.encode(second, reply=True).ids)} tokens from the cache")
    assert found >= tokens // BLOCK * BLOCK - BLOCK  # the block in which the turns meet may differ


def test_a_whole_chain_is_served_from_the_cache(vllm: Vllm, transformer: Served, films: Path) -> None:
    before = vllm.metric("vllm:prefix_cache_hits_total"), vllm.metric("vllm:prefix_cache_queries_total")
    image = data_uri(films / "images" / "5.png")
    prediction(transformer, "Is there a nodule in the lower zone of the left lung?", image)
    hits = vllm.metric("vllm:prefix_cache_hits_total") - before[0]
    asked = vllm.metric("vllm:prefix_cache_queries_total") - before[1]
    print(f"one chain: {hits:.0f} of {asked:.0f} prompt tokens from the cache")
    assert hits > 0


def test_a_transformer_without_its_predictor_is_not_ready_and_says_502(films: Path, tmp_path: Path) -> None:
    from tests.support.http_server import free_port
    from tests.support.model_servers import serving, until

    image = data_uri(films / "images" / "0.png")
    options = ["--checkpoint", str(POLICY), "--predictor_host", f"127.0.0.1:{free_port()}"]
    with serving(tmp_path / "log", *options) as server:

        def live() -> bool:
            try:
                return httpx.get(f"{server.url}/v2/health/live", timeout=60).status_code == 200
            except httpx.HTTPError:
                return False

        until(live, 900)
        assert httpx.get(f"{server.url}/v2/health/ready", timeout=30).status_code == 503
        reply = httpx.post(server.url + PREDICT, json=v1("Is there a nodule?", image), timeout=600)
        assert (reply.status_code, reply.json()["code"]) in ((502, "model_failed"), (503, "not_ready"))
