from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from clincot.datasets.folder import StudyIndex
from clincot.models.vlm import VisionLanguageModel
from clincot.records import Study
from tests.support import tiny


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint with larger weights behind the tower: as they are drawn (deviation .02), what is said
    hardly depends on the picture, and a test that compares it could not fail. Two layers, because a single one sees the
    pictures' features normalised alone, and a normalised feature has no gradient along itself: no relevance."""
    folder = tiny.write_model(tmp_path_factory.mktemp("small") / "policy", seed=0, text_layers=2)
    weights = load_file(folder / "model.safetensors")
    louder = {
        name: tensor * 8 if tensor.ndim == 2 and "vision_model" not in name else tensor
        for name, tensor in weights.items()
    }
    save_file(louder, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def small(small_dir: Path) -> VisionLanguageModel:
    return VisionLanguageModel(small_dir)


@pytest.fixture(scope="session")
def shown(films: Path) -> list[Study]:
    return list(StudyIndex(films).values())
