"""The prepare stage: select the questions of one round."""

from __future__ import annotations

from itertools import islice

from clincot.config import PrepareConfig
from clincot.errors import InvalidInput
from clincot.jsonl import write_records
from clincot.stages.base import Metrics, Paths, Stage


def prepare(config: PrepareConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.datasets.folder import iter_single_image, load_questions, split_rounds

    numbered = split_rounds(iter_single_image(load_questions(inputs["data"])), rounds=config.rounds, seed=config.seed)
    subset = (question for number, question in numbered if number == config.round)
    count = write_records(outputs["questions"], islice(subset, config.limit or None))
    if count == 0:
        outputs["questions"].unlink()
        raise InvalidInput(f"{inputs['data']}: no question falls into round {config.round} of {config.rounds}")
    return {"questions": count}


STAGE = Stage(
    name="prepare",
    run=prepare,
    config=PrepareConfig,
    inputs=("data",),
    outputs=("questions",),
    device="cpu",
    about="Select the questions of one round: a subset disjoint from the other rounds', split by image.",
)
