"""Every task of a round under every fault, compared with the page that says what happens (docs/kubeflow/faults.md)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.fault_world import FaultWorld, build_fault_world
from tests.faults.matrix import FAULTS, exercise_cell, read_page

PAGE = read_page()
TITLES = {fault.title: fault for fault in FAULTS}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultWorld]:
    with build_fault_world(tmp_path_factory.mktemp("faults")) as built:
        yield built


def test_the_page_has_every_task_under_every_fault(world: FaultWorld) -> None:
    assert {title for title, _ in PAGE} == {*TITLES}
    assert {*PAGE} == {(title, name) for title in TITLES for name in world.tasks}


@pytest.mark.parametrize(("title", "name"), [*PAGE], ids=lambda value: str(value).replace(" ", "-"))
def test_a_task_does_under_a_fault_what_the_page_says(world: FaultWorld, title: str, name: str) -> None:
    assert exercise_cell(world, TITLES[title], name) == PAGE[title, name]
