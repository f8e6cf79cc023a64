from __future__ import annotations

from pathlib import Path

import pytest

from clincot.prompts import PromptFormat, load_prompt_format
from clincot.records import Study
from tests.support.training_builders import build_policy, build_studies


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture(scope="session")
def views(policy_dir: Path) -> PromptFormat:
    return load_prompt_format(policy_dir)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="session")
def studies(folder: Path) -> list[Study]:
    return build_studies(folder, 12)
