"""Parameters of the pipeline: how settings travel through Kubeflow Pipelines, and what the UI says about them.

A run has typed fields for what people change and one JSON object for each section of params.yaml (run_form.py).
`DESCRIPTIONS` holds the only copy of the text for each input and output. The docstrings of the components repeat these
texts, because kfp reads its descriptions from the source (`python -m clincot.pipelines.component_docs --write` updates
them). Argo keeps the specs of a task in eight places, so the compiled pipeline contains the descriptions of the
run's parameters alone, which are those that the UI shows (pipeline_builder.shorten_specs).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clincot.config import (
    EvaluateConfig,
    FrozenConfig,
    PrepareConfig,
    ProposeConfig,
    PublishConfig,
    parse_config,
)
from clincot.records import hash_json
from clincot.stages import catalog

JsonObject = Mapping[str, Any]

NULL_PLACEHOLDER = "null"

_SEED_DIGITS = 7  # hexadecimal digits of a derived seed: 28 bits, which every random generator accepts

# Text for each input and output by name, or by "component.name" where a component uses a name in another sense.
DESCRIPTIONS: Mapping[str, str] = {
    # sections of params.yaml and settings files
    "preflight": "Settings of the checks before the round: base policy, time limits, free disk space.",
    "prepare": "Settings of the question split: number of subsets, limit, seed.",
    "propose": "Settings of the regions: grounders and their counts, hypotheses, sampling.",
    "answer": "Settings of the answers: sampling, length, steps of a chain.",
    "judge": "Settings of the judge panel: judges, calibration, quorum, retries.",
    "pair": "Settings of the preference pairs: smallest score gap, pairs per question.",
    "version": "Settings of the data repository: git address, branch, number of the version.",
    "train": "Settings of the training: loss, margin, learning rate, batch size, adapters.",
    "evaluate": "Settings of the evaluation: kinds of regions, answer length, resamples.",
    "decide": "Settings of the promotion gate: error budget, smallest gain, floors, leak limits.",
    "publish": "Settings of the model registry: store, name of the model, golden questions.",
    "deploy": "Settings of the rollout: traffic steps, time limits, smoke tests, approval.",
    "service": "Settings of the InferenceService: name, namespace, engine, images, resources.",
    "launch": "How training is started: in the task, with torchrun, or as a TrainJob.",
    # fields of the form
    "data": "Required. Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.",
    "benchmark": "Required. Address of the held-out data set with its answer key.",
    "store": "Required. Folder or `s3://bucket/prefix` for checkpoints, champion and records.",
    "model": "Name of the model whose checkpoints succeed one another.",
    "base": "Starting policy of a model without a champion: a checkpoint's address; empty: none.",
    "recipe": "Name of the recipe that the settings come from, for the round's page; empty: neutral.",
    "blind_from": "Address of a data set whose answers the blind baseline may use; empty: no baseline.",
    "calibrated_on": "Address of the data set on which the judges were calibrated, for the leak check.",
    "number": "Number of the run's first round; 0: the next round of the model.",
    "questions": "Maximum number of questions of a round; 0: the whole subset.",
    "shards": "Number of shards into which the questions of a round are split.",
    # settings by address
    "settings": "Address of the task's settings, which ends in their sha256.",
    "round_settings": "Settings of the records of the round.",
    "prepare_settings": "Settings of prepare.",
    "generate_settings": "Settings of generate.",
    "pair_settings": "Settings of pair.",
    "version_settings": "Settings of version.",
    "train_settings": "Settings of train.",
    "evaluate_settings": "Settings of both evaluations.",
    "decide_settings": "Settings of decide.",
    "publish_settings": "Settings of publish.",
    "deploy_settings": "Settings of deploy.",
    "page_settings": "Settings of page.",
    # policies
    "policy": "Address of the policy from which the run starts.",
    "policy_digest": "sha256 of the policy that the task uses.",
    "policy_round": "Round that trained the policy; 0: the base policy.",
    "challenger_digest": "sha256 of the challenger.",
    "trained_digest": "sha256 of the challenger.",
    # numbers and names
    "ahead": "Position of this round in the run, from 0.",
    "rounds": "Number of rounds in the run.",
    "work": "Address of the settings of generate, with questions and policy.",
    "generation.questions": "sha256 of the questions of the round.",
    "pair.questions": "sha256 of the questions of the round.",
    "prepare.questions": "sha256 of the questions of the round.",
    "shard_groups": "Shards of each task, such as 1-4/8 and 5-8/8.",
    "group": "Shards of this task, such as 1-4/8.",
    "groups": "Largest number of tasks that process shards.",
    "pair.shards": "What generate or judge returned for each group.",
    "generate.judges": "Whether the judges score the answers too; otherwise judge does.",
    "judge.answered": "What generate returned for this group.",
    "lap": "How often earlier rounds used the questions.",
    "run": "Identifier of the pipeline run.",
    "status": "Final status of the run, from Kubeflow Pipelines.",
    "verdict": "promote, keep or blocked.",
    "digest": "sha256 of the published checkpoint.",
    "target": "Where to roll out: kserve or local.",
    "state": "Folder of a local rollout; empty: serving.",
    "code": "Stands for the source in local caches.",
    "champion": "Policy from which the round would start (JSON).",
    # the comparison
    "seeds": "Seeds of the comparison: a JSON list of integers.",
    "seed": "Seed of this task.",
    "params": "All settings of the comparison, by section of params.yaml.",
    "set_name": "Name of the benchmark for its published rows; empty: as its ingest report says.",
    "measured": "Addresses of what was measured, one for each seed.",
    "comparison_table": "Table of the comparison (Markdown).",
    "comparison": "Results of the comparison (JSON).",
    "start_comparison.base": "Starting policy: a checkpoint's address; empty: preflight.base.",
    "comparison.base": "Starting policy: a checkpoint's address; empty: preflight.base.",
    "start_comparison.recipe": "Name of the recipe that the settings come from; empty: neutral.",
    "comparison.recipe": "Name of the recipe that the settings come from; empty: neutral.",
    "start_comparison.rounds": "Number of rounds; 0: as prepare.rounds says.",
    "comparison.rounds": "Number of rounds; 0: as prepare.rounds says.",
    "start_comparison.settings": "Address of the settings of the comparison, which ends in their sha256.",
    "compare_seed.Output": "Address of what was measured.",
    # artifacts
    "checks": "All checks with their remedies (Markdown).",
    "preferences": "Folder: regions, candidates, judgements, scores, pairs.",
    "preferences_before": "Preferences of the previous round.",
    "data_version": "Version of the preference data, with its tag (JSON).",
    "challenger": "Challenger: weights, tokenizer and record.",
    "trained": "Challenger of the previous round; replaces `policy`.",
    "champion_results": "Folder: the champion's outcomes and report.",
    "challenger_results": "Folder: the challenger's outcomes and report.",
    "base_results": "Folder: the base policy's outcomes and report.",
    "next_champion_results": "Results of the champion after the decision.",
    "decision": "The decision and its reasons (Markdown).",
    "round_files": "Folder: the decision, and all files of the round.",
    "figures": "Verdict and accuracy, to compare runs.",
    "round_page": "Page of the round: images, figures, digests (HTML).",
    "round_questions": "Folder: all questions of the round, to search, filter and sort (index.html).",
    "benchmark_table": "Benchmark table of the round (Markdown).",
    # values that a component returns
    "generate.Output": "sha256 of the list of the shards' files.",
    "judge.Output": "sha256 of the list of the shards' files, with scores.",
    "version.Output": "sha256 of the record of the data version.",
    "train.data_version": "sha256 of the record of the data version.",
    "train.Output": "sha256 of the challenger.",
    "decide.Output": "promote, keep or blocked.",
    "publish.Output": "sha256 of the published checkpoint.",
    "deploy.Output": "Outcome of the rollout, in words.",
    "end_round.Output": "What was recorded, in words.",
    "record_run_status.Output": "What was recorded, in words.",
}


def describe(component: str, name: str) -> str:
    """Return the description of an input or output of a component or subpipeline.

    Raises KeyError if no table describes it.
    """
    return DESCRIPTIONS.get(f"{component}.{name}") or DESCRIPTIONS[name]


def encode_params(content: JsonObject) -> dict[str, Any]:
    """Return a section as a default value for kfp, which has no null: the text "null" replaces it."""
    return {name: _replace_values(value, None, NULL_PLACEHOLDER) for name, value in content.items()}


def decode_params(content: JsonObject) -> dict[str, Any]:
    """Invert `encode_params`."""
    return {name: _replace_values(value, NULL_PLACEHOLDER, None) for name, value in content.items()}


def _replace_values(value: Any, old: Any, new: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _replace_values(item, old, new) for name, item in value.items()}
    if isinstance(value, list):
        return [_replace_values(item, old, new) for item in value]
    return new if value == old and type(value) is type(old) else value


def parse_stage_config(stage: str, content: JsonObject, *, lap: int = 0) -> FrozenConfig:
    """Parse the section of a stage. Raises InvalidRecord that names the parameter and the key.

    lap: how often earlier rounds used the questions of this round. Lap 0 keeps the seed of the section, as
    `clincot rounds` does, which never uses a question twice. Each later lap derives another seed from both.
    """
    config: FrozenConfig = parse_config(
        catalog.get_stage(stage).config, decode_params(content), where=f"pipeline parameter {stage!r}"
    )
    if not int(lap):
        return config
    seed = int(hash_json([config.model_dump()["seed"], int(lap)])[:_SEED_DIGITS], 16)
    return config.model_copy(update={"seed": seed})


def build_prepare_config(content: JsonObject, number: int, rounds: int) -> tuple[PrepareConfig, int]:
    """Return the section of round `number` (1, 2, …) in a run of `rounds` rounds, and the lap of its questions.

    After the last subset of the questions the first one is used again, in lap 1, 2, … (see `parse_stage_config`).
    """
    config = parse_config(PrepareConfig, decode_params(content), where="pipeline parameter 'prepare'")
    subsets = max(config.rounds, rounds)
    lap, subset = divmod(config.round + int(number) - 1, subsets)
    return config.model_copy(update={"rounds": subsets, "round": subset}), lap


def build_evaluate_config(content: JsonObject, propose: JsonObject) -> EvaluateConfig:
    """Return the section with the grounders of the round."""
    config = parse_config(EvaluateConfig, decode_params(content), where="pipeline parameter 'evaluate'")
    grounders = parse_config(ProposeConfig, decode_params(propose), where="pipeline parameter 'propose'")
    return config.model_copy(update={"propose": grounders})


def build_publish_config(content: JsonObject, number: int) -> PublishConfig:
    """Return the section with the round of the checkpoint, unless the section sets one."""
    config = parse_config(PublishConfig, decode_params(content), where="pipeline parameter 'publish'")
    return config if config.round else config.model_copy(update={"round": int(number)})
