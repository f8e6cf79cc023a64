"""The train stage: margin-aware DPO on the preference pairs."""

from __future__ import annotations

from clincot import config
from clincot.generation.requests import steps_of
from clincot.jsonl import BadRecord, file_digest, read_records, write_records
from clincot.records import Checkpoint, DataVersion
from clincot.stages.base import Metrics, Paths, Stage


def train(section: config.TrainSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.models.checkpoint import checkpoint_digest
    from clincot.models.load import forget
    from clincot.training.job import Work
    from clincot.training.launch import run_training
    from clincot.training.launch_settings import load_launch

    launch = load_launch(inputs.get("launch"))
    data, revision = _kept_as(inputs)
    work = Work(
        section=section,
        data=inputs["data"],
        questions=inputs["questions"],
        regions=inputs["regions"],
        candidates=inputs["candidates"],
        pairs=inputs["pairs"],
        policy=inputs["policy"],
        steps=steps_of(inputs),
        checkpoint=outputs["checkpoint"],
    )
    forget()  # a policy held for answering would double the memory of a large one
    metrics = run_training(work, launch)
    record = Checkpoint(
        uri=str(outputs["checkpoint"]),
        sha256=checkpoint_digest(outputs["checkpoint"]),
        parent=checkpoint_digest(inputs["policy"]),
        pairs=file_digest(inputs["pairs"]),
        config=section.digest,
        data=data,
        data_revision=revision,
    )
    write_records(outputs["checkpoint"] / "record.json", [record])
    return metrics


def _kept_as(inputs: Paths) -> tuple[str, str]:
    """Which version of preference data the pairs are, for the checkpoint's record: its digest and its revision."""
    if "version" not in inputs:
        return "", ""
    (kept,) = read_records(inputs["version"], DataVersion)
    pairs = file_digest(inputs["pairs"])
    if pairs not in {file.sha256 for file in kept.files}:
        raise BadRecord(f"{inputs['version']}: is a version of other pairs than {inputs['pairs']} (sha256 {pairs})")
    return kept.sha256, kept.revision


STAGE = Stage(
    name="train",
    run=train,
    config=config.TrainSection,
    inputs=("data", "questions", "regions", "candidates", "pairs", "policy"),
    outputs=("checkpoint",),
    device="gpu",
    about="margin-aware DPO on the pairs; reference: the policy it starts from",
    optional=("steps", "version", "launch"),
    beside=("version", "launch"),
)
