"""Load: the bounded queue, deadlines, disconnected clients, and answers that do not depend on batching."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from clincot.config.server_settings import ServeSettings
from clincot.models.protocols import Generation
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import Conversation
from tests.support import tiny
from tests.support.model_servers import LOOK_ONCE, PREDICT, Parrot, data_uri, serving_here, until, v1


def metric(url: str, name: str) -> float:
    """The sum over all label values."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


async def posts(url: str, bodies: Sequence[dict[str, Any]], *, at_once: int = 64) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(timeout=6000, limits=limits) as http:
        return await asyncio.gather(*(http.post(url + PREDICT, json=body) for body in bodies))


def test_a_full_queue_says_when_to_try_again(film: str) -> None:
    """Two run and three wait: of ten requests five are answered and five get 429."""
    parrot = Parrot()
    settings = ServeSettings.model_validate({"propose": LOOK_ONCE, "running": 2, "waiting": 3})
    with serving_here(parrot, settings) as url:
        before = metric(url, "clincot_queue_length")

        async def ten() -> list[httpx.Response]:
            asked = asyncio.create_task(posts(url, [v1("Is there a nodule?", film)] * 10))
            while refused(url) < 5 or metric(url, "clincot_queue_length") < before + 3:
                await asyncio.sleep(0.02)
            parrot.go.set()
            return await asked

        def refused(url: str) -> float:
            return metric(url, 'clincot_refused_total{code="queue_full"}') - started

        started = metric(url, 'clincot_refused_total{code="queue_full"}')
        replies = asyncio.run(ten())
        assert sorted(reply.status_code for reply in replies) == [200] * 5 + [429] * 5
        told = [reply for reply in replies if reply.status_code == 429]
        assert all(1 <= int(reply.headers["Retry-After"]) <= 30 for reply in told)
        assert (
            httpx.post(url + PREDICT, json=v1("Is there a nodule?", film)).status_code == 200
        )  # the queue has room again


def test_running_and_waiting_requests_get_504_at_the_deadline(film: str) -> None:
    parrot = Parrot()
    settings = ServeSettings.model_validate({"propose": LOOK_ONCE, "running": 1, "deadline_s": 0.5})
    with serving_here(parrot, settings) as url:
        replies = asyncio.run(posts(url, [v1("Is there a nodule?", film)] * 2))
        parrot.go.set()
        assert [reply.status_code for reply in replies] == [504, 504]
        assert replies[0].json()["code"] == "deadline_exceeded"


def test_a_disconnected_client_frees_its_slot(film: str) -> None:
    """The only slot is free again while the model is still busy with the lost request."""
    parrot = Parrot()
    settings = ServeSettings.model_validate({"propose": LOOK_ONCE, "running": 1, "waiting": 0})
    with serving_here(parrot, settings) as url:
        address = httpx.URL(url)
        body = httpx.Request("POST", url, json=v1("Is there a nodule?", film)).content
        with socket.create_connection((address.host, address.port)) as connection:
            head = (
                f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            assert parrot.asked.wait(300)
            assert httpx.post(url + PREDICT, json=v1("Is there a nodule?", film)).status_code == 429
            held = metric(url, "clincot_running")
        until(lambda: metric(url, "clincot_running") == held - 1)
        assert not parrot.go.is_set()
        parrot.go.set()
        assert httpx.post(url + PREDICT, json=v1("Is there a nodule?", film)).status_code == 200


class Counting:
    """A model that records the sizes of its batches."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model, self.digest, self.views = model, model.digest, model.views
        self.sizes: list[int] = []

    def generate(self, conversations: Sequence[Conversation], **options: Any) -> list[Generation]:
        self.sizes.append(len(conversations))
        return self.model.generate(conversations, **options)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        self.sizes.append(len(conversations))
        return self.model.p_yes(conversations)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    """An untrained model with large weights, so that its answers depend on the image."""
    folder = tiny.write_model(tmp_path_factory.mktemp("small") / "policy", seed=0, text_layers=2)
    weights = load_file(folder / "model.safetensors")
    louder = {n: t * 8 if t.ndim == 2 and "vision_model" not in n else t for n, t in weights.items()}
    save_file(louder, folder / "model.safetensors", metadata={"format": "pt"})
    return VisionLanguageModel(folder)


def likelihood(answer: dict[str, Any]) -> float:
    """That of the winning region. The untrained model's answers are cut off, so their confidence is 0."""
    value: float = answer["regions"][answer["winner"]]["likelihood"]
    return value


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two chains are the same.

    Batch composition changes rounding, so numbers may differ by 1e-4. Answers and regions must be equal, except that
    regions whose confidences are within 1e-4 may be exchanged.
    """
    if abs(one["confidence"] - other["confidence"]) > 1e-4 or abs(likelihood(one) - likelihood(other)) > 1e-4:
        return False
    places = [[(r["box"], r["answer"]) for r in a["regions"]] for a in (one, other)]
    found = sorted(r["found"] for r in one["regions"])
    ties = any(b - a < 1e-4 for a, b in itertools.pairwise(found))
    return one["answer"] == other["answer"] and (places[0] == places[1] or ties)


def test_batching_does_not_change_answers(small: VisionLanguageModel, films: Path) -> None:
    """1000 requests by 16 clients about 6 films, each compared with its answer without other requests."""
    counting = Counting(small)
    look = {"grounders": {"windows": 1, "written": 1}, "window_sides": [0.5], "window_stride": 1.0, "temperature": 0.0}
    settings = ServeSettings.model_validate({"propose": look, "max_new_tokens": 2, "deadline_s": 600, "body_s": 120})
    bodies = [v1("Is there a nodule?", data_uri(films / "images" / f"{n}.png")) for n in range(6)]
    with serving_here(counting, settings) as url:
        alone = [httpx.post(url + PREDICT, json=body, timeout=600).json()["predictions"][0] for body in bodies]
        most = max(counting.sizes)
        replies = asyncio.run(posts(url, [bodies[n % 6] for n in range(1000)], at_once=16))
    answers = [reply.json()["predictions"][0] for reply in replies]
    assert len({likelihood(answer) for answer in alone}) > 1  # the answers depend on the film
    assert max(counting.sizes) > most  # requests did share forward passes
    assert [n for n, answer in enumerate(answers) if not same(answer, alone[n % 6])] == []
