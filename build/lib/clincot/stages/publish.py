"""The publish stage: store a checkpoint in the model registry, with its evidence."""

from __future__ import annotations

from clincot.config import PublishConfig
from clincot.jsonl import write_json
from clincot.stages.base import Metrics, Paths, Stage


def publish(config: PublishConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.registry.golden import publish_checkpoint
    from clincot.serving.reference_answers import answer_as_served

    manifest = publish_checkpoint(config, inputs, load_look=answer_as_served)
    write_json(outputs["published"], manifest.model_dump(mode="json"))
    return {"files": len(manifest.files), "bytes": sum(f.size for f in manifest.files), "golden": len(manifest.golden)}


STAGE = Stage(
    name="publish",
    run=publish,
    config=PublishConfig,
    inputs=("checkpoint",),
    outputs=("published",),
    device="gpu",
    about="Store a checkpoint under its digest, with manifest, model card and golden questions.",
    optional=("report", "decision", "panel_report", "golden"),
    flags=("store", "name", "adapter"),
)
