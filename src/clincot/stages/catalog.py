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


# What every input and output of a stage is, and who makes it; used by --help, the pipeline and the docs.
# "champion" and "report" mean something else in different stages, so their sentences name the stages.
ARTIFACTS: dict[str, str] = {
    "benchmark": "Held-out data-set folder with its answer key (references.jsonl); made by `clincot ingest`.",
    "base": "Outcomes of the base policy on the benchmark (JSONL), for gains since the start; written by `evaluate`.",
    "blind": "Data-set folder whose answers the image-blind baseline knows; without it, it knows the benchmark's own.",
    "calibration": "Data-set folder on which the judges were calibrated, to detect overlap with the benchmark.",
    "candidates": "The policy's answers, one from each region of a question (JSONL); written by `answer`.",
    "candidates_before": "Candidates of the previous steps of a chain of questions (JSONL); written by `answer`.",
    "challenger": "Outcomes of the new policy on the benchmark (JSONL); written by `evaluate`.",
    "champion": (
        "For `decide`: outcomes of the current champion on the benchmark (JSONL), written by `evaluate`. "
        "For `preflight`: the policy that the round starts from (JSON), written when every check passes."
    ),
    "checkpoint": "Folder of a trained policy with its record.json; written by `train`.",
    "data": "Data-set folder with questions, studies and images; made by `clincot ingest` or `clincot render`.",
    "decision": "The verdict (promote, keep or blocked) with its checks and reasons (JSON); written by `decide`.",
    "evidence": "One row for each benchmark question with the answers of every side (JSONL); written by `decide`.",
    "golden": "Data-set folder from which smoke-test questions are drawn; they are published with their answers.",
    "judgements": "Every judge's score of every candidate (JSONL); written by `judge`.",
    "launch": "Settings of how training is started, such as a Kubeflow job (YAML); written by the operator.",
    "ledger": "Folder of the error budget and of the questions used; empty at first, `decide` appends to it.",
    "outcomes": "The policy's scored answers to the benchmark, by kind of region (JSONL); written by `evaluate`.",
    "pair_report": "Statistics of the preference pairs, such as length bias (JSON); written by `pair`.",
    "pairs": "Preference pairs with their score gaps (JSONL); written by `pair`.",
    "panel_report": "Agreement and health of the panel of judges (JSON); written by `judge`.",
    "panel_report_before": "The panel report of the previous round (JSON), to detect a shift of the scores.",
    "policy": "Checkpoint folder of the policy: the base model, or what `train` wrote in an earlier round.",
    "published": "Manifest of the published checkpoint, with its address and digest (JSON); written by `publish`.",
    "questions": "The questions of this round (JSONL); written by `prepare`.",
    "regions": "The regions of every question, the whole image included (JSONL); written by `propose`.",
    "report": (
        "Report of the stage (JSON). `evaluate`: the benchmark metrics with confidence intervals, which `publish` puts "
        "into the model card. `preflight`: the result of every check."
    ),
    "scores": "The panel's combined score of every candidate (JSONL); written by `judge`.",
    "scores_before": "Panel scores of the previous steps of a chain of questions (JSONL); written by `judge`.",
    "service": "Settings of the inference service (YAML), see deployment/service_settings.py; written by the operator.",
    "steps": "JSON list of the chain's questions, the value of answer.steps; written by `clincot rounds`.",
    "summary": "The decision explained in a few lines of Markdown; written by `decide`.",
    "table": "The results of all checks as a Markdown table; written by `preflight`.",
    "train_reports": "Training reports (reports.jsonl): the vocabulary of R2Gen's protocol; made by `clincot ingest`.",
    "version": "Where the round's preference data was committed: tag, commit and digests (JSON); written by `version`.",
}


def get_stage(name: str) -> Stage:
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise InvalidInput(f"no stage is called {name!r}; there are {', '.join(stage.name for stage in STAGES)}")
