"""What a person reads about stages and their files in --help and in the Kubeflow UI."""

from __future__ import annotations

import pytest

from clincot.stages.base import Stage
from clincot.stages.catalog import ARTIFACTS, STAGES

NAMES = {name for stage in STAGES for name in (*stage.inputs, *stage.optional, *stage.outputs)}


def test_every_artifact_is_described_and_no_other() -> None:
    assert {*ARTIFACTS} == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_artifact_is_described_by_a_sentence(name: str) -> None:
    """What kind of file it is comes first; a full stop ends it."""
    text = ARTIFACTS[name]
    assert text.startswith(("Folder of ", "JSON ", "Markdown ", "YAML or JSON "))
    assert text.endswith(".")
    assert 40 <= len(text) <= 120
    assert "  " not in text


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_is_described_in_the_imperative(stage: Stage) -> None:
    """A verb comes first ("Decide whether …"), never an article or a noun."""
    verbs = {"Answer", "Check", "Decide", "Make", "Measure", "Propose", "Push", "Score", "Select", "Store", "Train"}
    assert stage.about.split()[0] in verbs
    assert stage.about.endswith(".")
    assert stage.about.count(". ") == 0
