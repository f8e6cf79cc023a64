"""A server of Kubeflow Pipelines for each test that asks for it, and plans that are compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clincot.pipelines import round as round_module
from clincot.pipelines import submit as submitting
from clincot.pipelines.client import Connection, connect_pipelines
from clincot.pipelines.round_plan import RoundPlan
from tests.support.kfp_stub import PipelinesStub, serving


@pytest.fixture(scope="session")
def compiled_once() -> Iterator[None]:
    """Let submit, upload and schedule reuse the compiled pipeline of an equal plan (a second or more)."""
    made: dict[str, bytes] = {}

    def compile_once(plan: RoundPlan, out: Path) -> None:
        key = repr(plan)
        if key not in made:
            round_module.compile_round(plan, out)
            made[key] = out.read_bytes()
        out.write_bytes(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submitting, "compile_round", compile_once)
        yield


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[PipelinesStub]:
    for name in ("KFP_ENDPOINT", "KFP_TOKEN", "KFP_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with serving(PipelinesStub()) as running:
        yield running


@pytest.fixture
def connection(stub: PipelinesStub) -> Connection:
    return connect_pipelines(stub.url)
