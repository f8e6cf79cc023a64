"""The list of stages, and what each of their files is.

The command line, the loop of rounds and the pipelines read this list and call `run_stage(name, …)`. Heavy imports
happen inside the stages' functions: importing this module loads neither torch nor kfp.

A rollout is not a stage (`clincot deploy`, deployment/rollout.py): it changes the state of a cluster, which others
change too, so a file that says "done" would not stay true.

No stage before `evaluate` gets the answer key (references.jsonl); the earlier stages run where there is none.
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


# What every input and output of a stage is, for --help, the pipeline's parameters and the documentation.
ARTIFACTS: dict[str, str] = {
    "base": "JSON Lines of the base policy's benchmark outcomes, which `evaluate` writes for the policy of round 0.",
    "benchmark": "Folder of a held-out data set with its answer key, which `ingest` or `render` writes.",
    "blind": "Folder of a labelled data set on which the image-blind baseline is fitted.",
    "calibration": "Folder of the labelled data set on which the judges were calibrated, searched for leaks.",
    "candidates": "JSON Lines of the policy's answers, one per region and step, which `answer` writes.",
    "candidates_before": "JSON Lines of the candidates of a chain's earlier steps, which `answer` writes.",
    "challenger": "JSON Lines of the challenger's benchmark outcomes, which `evaluate` writes.",
    "champion": "JSON of the policy from which the round starts, which `preflight` writes.",
    "checkpoint": "Folder of a model's weights, tokenizer and record, which `train` writes.",
    "data": "Folder of a data set with studies, images and questions, which `ingest` or `render` writes.",
    "decision": "JSON of the verdict (promote, keep or blocked) with its checks, which `decide` writes.",
    "evidence": "JSON Lines of both sides' answers to every benchmark question, which `decide` writes.",
    "golden": "Folder of a data set from which the golden questions of smoke tests are chosen.",
    "judgements": "JSON Lines of every judge's score of every candidate, which `judge` writes.",
    "launch": "YAML or JSON settings of how training is started (launch.yaml), which an operator writes.",
    "ledger": "Folder of the error budget spent and the benchmark questions used, to which `decide` appends.",
    "outcomes": "JSON Lines of a policy's answers to the benchmark, one per question and arm, which `evaluate` writes.",
    "pair_report": "JSON report of how many pairs were made and why others were not, which `pair` writes.",
    "pairs": "JSON Lines of preference pairs with their score gaps, which `pair` writes.",
    "panel_report": "JSON report of the judges: who scored, who was left out, how far they agree; `judge` writes it.",
    "panel_report_before": "JSON report of the judges of the previous round, compared to find a shift of their scores.",
    "policy": "Folder of the checkpoint of the policy that the stage uses; `train` or an outside tool writes it.",
    "published": "JSON manifest of the stored checkpoint, which `publish` writes.",
    "questions": "JSON Lines of the questions of this round, which `prepare` writes.",
    "regions": "JSON Lines of the proposed regions of every question, which `propose` writes.",
    "report": "JSON report of the stage: all checks from `preflight`, the benchmark's metrics from `evaluate`.",
    "scores": "JSON Lines of the panel's calibrated score of every candidate, which `judge` writes.",
    "scores_before": "JSON Lines of the scores of a chain's earlier steps, which `judge` writes.",
    "origin": "JSON with the line, the round and the run that made the data, for its version.",
    "service": "YAML or JSON settings of the service to deploy to (service.yaml), which an operator writes.",
    "steps": "JSON list of the chain's questions (answer.steps), which the loop of rounds writes.",
    "summary": "Markdown text of the decision and its reasons, which `decide` writes.",
    "table": "Markdown table of all checks with their remedies, which `preflight` writes.",
    "train_reports": "JSON Lines of the training set's reports, from which report metrics take their vocabulary.",
    "version": "JSON record of the preference data's version: its files, digest and revision; `version` writes it.",
}


def get_stage(name: str) -> Stage:
    """Return the stage of that name. Raises InvalidInput, listing the names, if there is none."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise InvalidInput(f"no stage is called {name!r}; there are {', '.join(stage.name for stage in STAGES)}")


# Artifacts of a stage that share their name with another stage's.
_OWN_ARTIFACTS = {
    "decide.champion": "JSON Lines of the champion's answers to the benchmark, which `evaluate` writes.",
}


def describe_artifact(stage: str, name: str) -> str:
    """Return the sentence about an input or output of a stage."""
    return _OWN_ARTIFACTS.get(f"{stage}.{name}") or ARTIFACTS[name]
