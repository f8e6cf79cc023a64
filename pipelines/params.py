"""Parameters of the pipeline: how settings travel through Kubeflow Pipelines, and what the UI says about them.

Kubeflow Pipelines carries one JSON object per section of params.yaml. `DESCRIPTIONS` holds the only copy of the text
for each input and output. The docstrings of the components repeat these texts, because kfp reads its descriptions from
the source (`python -m clincot.pipelines.component_docs --write` updates them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clincot.config import (
    AnswerConfig,
    EvaluateConfig,
    FrozenConfig,
    PrepareConfig,
    ProposeConfig,
    PublishConfig,
    parse_config,
)
from clincot.errors import InvalidInput
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
    # data sets and policies
    "data": "Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.",
    "data_digest": "sha256 of the data set, part of the cache key.",
    "benchmark": "Address of the held-out data set with its answer key.",
    "benchmark_digest": "sha256 of the benchmark, part of the cache key.",
    "recipe": "Name of the recipe that the settings come from, for the round's page; empty: neutral.",
    "blind_from": "Address of a data set whose answers the blind baseline may use; empty: no baseline.",
    "blind": "Address of a data set whose answers the blind baseline may use; empty: no baseline.",
    "calibrated_on": "Address of the data set on which the judges were calibrated, for the leak check.",
    "calibration": "Address of the data set on which the judges were calibrated, for the leak check.",
    "policy": "Address of the checkpoint from which the run starts.",
    "policy_digest": "sha256 of the checkpoint that the task uses, part of the cache key.",
    "policy_round": "Round that trained the checkpoint from which the run starts; 0: the base policy.",
    "champion_round": "Round that trained the checkpoint from which the run starts; 0: the base policy.",
    "panel_digest": "sha256 over the files of the judges, part of the cache key.",
    "image": "Image or source version, which stands for the code in the cache key.",
    # numbers and names
    "number": "Number of the run's first round; 0: the next round of the model.",
    "ahead": "Position of this round in the run, starting at 0.",
    "rounds": "Number of rounds in the run.",
    "shards": "Number of shards into which the questions are split.",
    "shard_names": "Names of the shards, such as 1/2 and 2/2.",
    "shard": "Shard of the questions to process, such as 1/2.",
    "lap": "How often earlier rounds used the same questions; each time samples with new seeds.",
    "steps": "Number of questions in a chain for which the pipeline was compiled.",
    "run": "Identifier of the pipeline run.",
    "status": "Final status of the run, filled in by Kubeflow Pipelines.",
    "pairs_digest": "sha256 of the preference pairs, part of the cache key.",
    "checkpoint_digest": "sha256 of the challenger's checkpoint.",
    "trained_digest": "sha256 of the challenger's checkpoint.",
    "verdict": "Verdict of the promotion gate: promote, keep or blocked.",
    "digest": "sha256 of the published checkpoint to roll out.",
    "target": "Where to roll out: kserve or local.",
    "state": "Folder for the state of a local rollout; empty: serving.",
    "train.version": "Record of the data version as JSON, kept with the checkpoint.",
    # artifacts of the pipeline itself; those of the stages are described in stages/catalog.py
    "trained": "Checkpoint that the previous round of this run trained; replaces `policy`.",
    "metrics": "Figures of the task for the Kubeflow UI.",
    "region_parts": "Regions of every shard.",
    "candidate_parts": "Candidates of every shard.",
    "judgement_parts": "Judgements of every shard.",
    "report_parts": "Panel reports of every shard.",
    "champion_outcomes": "Benchmark outcomes of the champion (JSONL).",
    "champion_report": "Benchmark report of the champion (JSON).",
    "challenger_outcomes": "Benchmark outcomes of the challenger (JSONL).",
    "challenger_report": "Benchmark report of the challenger (JSON).",
    "looks": "Page of the round: regions and pairs on the images, figures, digests (HTML).",
    "results": "Benchmark table of the round (Markdown).",
    "select_champion.outcomes": "Benchmark outcomes of the champion after the decision (JSONL).",
    "select_champion.report": "Benchmark report of the champion after the decision (JSON).",
    "preflight.report": "Result and remedy of every check (JSON).",
    "preflight.champion": "Policy from which the round would start (JSONL, one StartingPolicy).",
    "start_round.champion": "Policy that preflight found (JSONL, one StartingPolicy).",
    "decide.champion": "Benchmark outcomes of the champion (JSONL).",
    # values that a component returns
    "propose.Output": "sha256 of the regions.",
    "answer.Output": "sha256 of the candidates.",
    "judge.Output": "sha256 of the judgements.",
    "merge.Output": "sha256 of the merged candidates.",
    "pair.Output": "sha256 of the preference pairs.",
    "version.Output": "Record of the data version as JSON.",
    "train.Output": "sha256 of the challenger's checkpoint.",
    "evaluate.Output": "sha256 of the outcomes.",
    "decide.Output": "Verdict of the promotion gate: promote, keep or blocked.",
    "publish.Output": "sha256 of the published checkpoint.",
    "deploy.Output": "Outcome of the rollout, in words.",
    "end_round.Output": "What was recorded, in words.",
    "record_run_status.Output": "What was recorded, in words.",
}
_ARTIFACT_ALIASES = {"version_record": "version"}  # names that a component cannot share with its section


def describe(component: str, name: str, *, artifact: bool) -> str:
    """Return the description of an input or output of a component or subpipeline.

    Raises KeyError if no table describes it.
    """
    if f"{component}.{name}" in DESCRIPTIONS:
        return DESCRIPTIONS[f"{component}.{name}"]
    if artifact and _ARTIFACT_ALIASES.get(name, name) in catalog.ARTIFACTS:
        return catalog.ARTIFACTS[_ARTIFACT_ALIASES.get(name, name)]
    return DESCRIPTIONS[name]


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


def check_step_count(answer: JsonObject, compiled: int) -> None:
    """Raise InvalidInput if answer.steps has another length than the pipeline was compiled for."""
    steps = parse_config(AnswerConfig, decode_params(answer), where="pipeline parameter 'answer'").steps
    if len(steps) != int(compiled):
        raise InvalidInput(
            f"answer.steps has {len(steps)} questions, but the pipeline was compiled for {int(compiled)}; compile it "
            "with these parameters (`clincot pipeline compile --params …`)"
        )
