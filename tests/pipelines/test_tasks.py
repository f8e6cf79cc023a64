"""What tasks do around the stages: sections of recurring rounds."""

from __future__ import annotations

import pytest

from clincot.config import AnswerConfig, Params, PrepareConfig
from clincot.pipelines.params import build_prepare_config, parse_stage_config

SAMPLING = ("propose", "answer", "pair", "train")


def test_after_the_last_subset_the_first_is_asked_again_in_the_next_lap() -> None:
    """Of three subsets: rounds 1, 2, 3 ask subsets 0, 1, 2; rounds 4 and 7 ask subset 0 again."""
    content = PrepareConfig(rounds=3).model_dump(mode="json")
    asked = [build_prepare_config(content, number, 1) for number in range(1, 8)]
    assert [(config.round, lap) for config, lap in asked] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (0, 1),
        (1, 1),
        (2, 1),
        (0, 2),
    ]


def test_one_run_of_more_rounds_than_subsets_asks_no_question_twice() -> None:
    """As `clincot rounds`: the questions are split into as many subsets as there are rounds."""
    content = PrepareConfig(rounds=2).model_dump(mode="json")
    assert [build_prepare_config(content, number, 4)[1] for number in range(1, 5)] == [0, 0, 0, 0]


@pytest.mark.parametrize("stage", SAMPLING)
def test_every_lap_samples_with_a_seed_of_its_own(stage: str) -> None:
    """The first with the section's own; of another seed no lap meets one of this one's."""
    config = getattr(Params(), stage)
    laps = [parse_stage_config(stage, config.model_dump(mode="json"), lap=lap) for lap in range(4)]
    assert laps[0] == config
    others = [parse_stage_config(stage, {"seed": 1}, lap=lap) for lap in range(4)]
    assert len({one.model_dump()["seed"] for one in (*laps, *others)}) == 8
    assert [one.model_copy(update={"seed": config.model_dump()["seed"]}) for one in laps] == [config] * 4


def test_a_lap_is_what_kubeflow_makes_of_a_whole_number() -> None:
    content = AnswerConfig().model_dump(mode="json")
    assert parse_stage_config("answer", content, lap=2.0) == parse_stage_config("answer", content, lap=2)  # type: ignore[arg-type]
