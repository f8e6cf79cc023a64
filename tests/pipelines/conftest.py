"""Compiling the pipeline takes a second or more, so tests of the client compile each plan once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clincot.pipelines import round as round_module
from clincot.pipelines import submit as submitting
from clincot.pipelines.round_plan import RoundPlan


@pytest.fixture(scope="session")
def compiled_once() -> Iterator[None]:
    """Let submit, upload and schedule reuse the compiled pipeline of an equal plan."""
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
