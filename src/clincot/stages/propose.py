"""The propose stage: hypotheses about every question, grounded as regions of its image."""

from __future__ import annotations

from clincot.config import ProposeConfig
from clincot.jsonl import read_records, write_records
from clincot.records import Question
from clincot.stages.base import Metrics, Paths, Stage, show_progress


def propose(config: ProposeConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.datasets.folder import StudyIndex
    from clincot.generation.grounders import WrittenGrounder
    from clincot.generation.regions import build_grounders, propose_regions
    from clincot.models.load import load_policy

    grounders = build_grounders(config, load_policy(inputs["policy"], dtype=config.dtype))
    questions = show_progress(read_records(inputs["questions"], Question), "regions", "questions")
    regions = propose_regions(questions, StudyIndex(inputs["data"]), inputs["data"], grounders, config)
    count = write_records(outputs["regions"], regions)
    return {"regions": count, "off_format": sum(g.off_format for g, _ in grounders if isinstance(g, WrittenGrounder))}


STAGE = Stage(
    name="propose",
    run=propose,
    config=ProposeConfig,
    inputs=("data", "questions", "policy"),
    outputs=("regions",),
    device="gpu",
    about="Propose regions for every question: hypotheses, grounded in the image, and the whole image.",
)
