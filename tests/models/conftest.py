from __future__ import annotations

from pathlib import Path

import pytest

from clincot.datasets.folder import StudyIndex
from clincot.models.vlm import VisionLanguageModel
from clincot.records import Study
from tests import tiny


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("small") / "policy", seed=0)


@pytest.fixture(scope="session")
def small(small_dir: Path) -> VisionLanguageModel:
    return VisionLanguageModel(small_dir)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_set(tmp_path_factory.mktemp("films") / "data")


@pytest.fixture(scope="session")
def shown(films: Path) -> list[Study]:
    return list(StudyIndex(films).values())
