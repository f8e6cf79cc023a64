"""One tiny checkpoint a family and session, and the radiographs that they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.datasets.folder import StudyIndex
from clincot.models.vlm import VisionLanguageModel
from clincot.records import Study
from tests.support import tiny
from tests.support.families import FAMILIES, Family, has_torchvision


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize(
            "family", FAMILIES, ids=[family.name for family in FAMILIES], indirect=True, scope="session"
        )


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = request.param
    if chosen.needs_torchvision and not has_torchvision():
        pytest.skip("its processor needs torchvision; `make test-families` has it")
    return chosen


@pytest.fixture(scope="session")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(family.name) / "checkpoint"
    family.build(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> VisionLanguageModel:
    return VisionLanguageModel(checkpoint)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films of three shapes, so that a batch is ragged where the family makes tiles."""
    return tiny.write_set(tmp_path_factory.mktemp("films") / "data", shapes=((128, 128), (64, 160), (200, 72)))


@pytest.fixture(scope="session")
def studies(films: Path) -> list[Study]:
    return list(StudyIndex(films).values())
