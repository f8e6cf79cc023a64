"""The train stage: margin-aware DPO on the preference pairs."""

from __future__ import annotations

from clincot.config import TrainConfig
from clincot.generation.requests import read_steps
from clincot.jsonl import InvalidRecord, hash_files, read_records, write_records
from clincot.records import Checkpoint, DataVersion
from clincot.stages.base import Metrics, Paths, Stage


def train(config: TrainConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.models.checkpoint import hash_checkpoint
    from clincot.models.rollout_engines import free_models
    from clincot.training.job import TrainingJob
    from clincot.training.launch import run_training
    from clincot.training.launch_settings import load_launch_settings

    launch = load_launch_settings(inputs.get("launch"))
    data, revision = resolve_data_version(inputs)
    job = TrainingJob(
        config=config,
        data=inputs["data"],
        questions=inputs["questions"],
        regions=inputs["regions"],
        candidates=inputs["candidates"],
        pairs=inputs["pairs"],
        policy=inputs["policy"],
        steps=read_steps(inputs),
        checkpoint=outputs["checkpoint"],
    )
    free_models()  # a policy kept in memory for answering would double what a large model needs
    metrics = run_training(job, launch)
    record = Checkpoint(
        uri=str(outputs["checkpoint"]),
        sha256=hash_checkpoint(outputs["checkpoint"]),
        parent=hash_checkpoint(inputs["policy"]),
        pairs=hash_files(inputs["pairs"]),
        config=config.digest,
        data=data,
        data_revision=revision,
    )
    write_records(outputs["checkpoint"] / "record.json", [record])
    return metrics


def resolve_data_version(inputs: Paths) -> tuple[str, str]:
    """Return digest and revision of the pairs' data version, for the checkpoint's record; empty without a version.

    Raises InvalidRecord if the version is of other pairs.
    """
    if "version" not in inputs:
        return "", ""
    (version,) = read_records(inputs["version"], DataVersion)
    pairs = hash_files(inputs["pairs"])
    if pairs not in {file.sha256 for file in version.files}:
        raise InvalidRecord(f"{inputs['version']}: is a version of other pairs than {inputs['pairs']} (sha256 {pairs})")
    return version.sha256, version.revision


STAGE = Stage(
    name="train",
    run=train,
    config=TrainConfig,
    inputs=("data", "questions", "regions", "candidates", "pairs", "policy"),
    outputs=("checkpoint",),
    device="gpu",
    about="Train the policy on the pairs by margin-aware DPO; the policy it starts from is the reference.",
    optional=("steps", "version", "launch"),
    provenance_inputs=("version", "launch"),
)
