"""The only list of stages. A stage is a library function over files; everything that runs one reads this list.

The command line, the loop of rounds and the pipelines call `run_stage(name, …)`. It skips a stage whose inputs,
configuration and version are those of an earlier run that finished, so an interrupted run goes on where it was. Heavy
imports happen inside the functions: importing this module brings in neither torch nor kfp.

A rollout is no stage: what it makes is the state of a cluster, which others change too, so a stamp beside a file would
say "done" where it is undone (`clincot deploy`, deployment/rollout.py).

No stage before `evaluate` is given the answer key (references.jsonl); they run where there is none.
"""

from __future__ import annotations

from clincot.errors import InvalidInput
from clincot.stages import (
    answer,
    decide,
    evaluate,
    judge,
    pair,
    preflight,
    prepare,
    propose,
    publish,
    train,
    version,
)
from clincot.stages.base import Stage

STAGES: tuple[Stage, ...] = (
    preflight.STAGE,
    prepare.STAGE,
    propose.STAGE,
    answer.STAGE,
    judge.STAGE,
    pair.STAGE,
    version.STAGE,
    train.STAGE,
    evaluate.STAGE,
    decide.STAGE,
    publish.STAGE,
)


def get_stage(name: str) -> Stage:
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise InvalidInput(f"no stage is called {name!r}; there are {', '.join(stage.name for stage in STAGES)}")
