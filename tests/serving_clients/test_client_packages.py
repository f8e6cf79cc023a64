"""LangChain, LlamaIndex and tritonclient, each as its users call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving_clients.conftest import Addresses, run_program

# what the parrot answers: the number of turns and the first turn
OPENING = "3 turns: Is there a nodule?\nFirst name the region of the image to look at"
BRIEF = "3 turns: Be brief.\n\nIs there a nodule?\nFirst name the region of the image to look at"
REFUSAL = "The model abstains: its confidence in an answer is too low."


@pytest.fixture(scope="module")
def image(films: Path) -> str:
    return str(films / "images" / "0.png")


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_langchain(server: Addresses, image: str, prefix: str) -> None:
    """Its ChatOpenAI sends nulls, a system message, history, stream options, and a schema."""
    found: dict[str, Any] = run_program("langchain_client.py", server.http + prefix, image)
    assert found["content"].startswith(BRIEF)
    assert (found["refusal"], found["finish"]) == (None, "stop")
    assert found["asynchronous"].startswith(OPENING)
    assert found["streamed"].startswith("7 turns: Is there a nodule?")  # four of them are the history
    assert found["finding"]["answer"].startswith(OPENING)
    assert found["finding"]["confidence"] == pytest.approx(0.472367)
    for usage in (found["usage"], found["streamed_usage"]):  # of two windows and the whole image
        assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (300, 6, 306)


def test_langchain_shows_that_the_model_abstains(unsure_server: Addresses, image: str) -> None:
    found = run_program("langchain_client.py", unsure_server.http + "/v1", image)
    assert (found["content"], found["refusal"], found["streamed"]) == (REFUSAL, REFUSAL, REFUSAL)


def test_llama_index(server: Addresses, image: str) -> None:
    """OpenAILike samples at 0.1 by default; the plain class sends max_tokens."""
    found = run_program("llama_index_client.py", server.http + "/v1", image)
    assert found["content"].startswith(BRIEF)
    assert found["streamed"].startswith("7 turns: Is there a nodule?")
    assert found["asynchronous"].startswith(OPENING)
    assert found["openai_class"].startswith(OPENING)


def test_llama_index_shows_that_the_model_abstains(unsure_server: Addresses, image: str) -> None:
    """It reads the content only."""
    found = run_program("llama_index_client.py", unsure_server.http + "/v1", image)
    assert set(found.values()) == {REFUSAL}


def test_tritonclient(server: Addresses, image: str) -> None:
    """Binary tensors with the raw file, JSON beside them, and selected outputs, over HTTP and gRPC."""
    http = server.http.removeprefix("http://")
    found = run_program("triton_client.py", http, server.grpc, image)
    for kind in ("http", "grpc", "mixed"):
        assert found[kind]["answer"].startswith(OPENING)
        assert found[kind] == found["http"]
    assert found["http"]["confidence"] == pytest.approx(0.472367)
    assert (found["http"]["abstained"], found["http"]["regions"]) == (False, 3)
    for kind in ("http", "grpc"):
        assert found[f"{kind} outputs"] == ["answer", "confidence", "abstained", "chain"]
        answer, chain_is_absent = found[f"{kind} selected"]
        assert answer.startswith(OPENING)
        assert chain_is_absent
    assert "the parameter 'priority' is not supported" in found["refusal"]
