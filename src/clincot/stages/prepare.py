"""The prepare stage: select the questions of one round."""

from __future__ import annotations

from collections.abc import Iterator

from clincot.config import PrepareConfig
from clincot.errors import InvalidInput
from clincot.jsonl import write_records
from clincot.records import Question
from clincot.stages.base import Metrics, Paths, Stage


def prepare(config: PrepareConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.datasets.folder import load_questions, split_rounds

    def chosen() -> Iterator[Question]:
        subset = split_rounds(load_questions(inputs["data"]), rounds=config.rounds, seed=config.seed)
        mine = (question for number, question in subset if number == config.round)
        for taken, question in enumerate(mine):
            if config.limit and taken == config.limit:
                return
            yield question

    count = write_records(outputs["questions"], chosen())
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
    about="take the questions of one round: disjoint subsets, split by image",
)
