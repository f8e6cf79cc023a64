"""The propose stage: hypotheses about every question, grounded as regions of its image."""

from __future__ import annotations

from clincot.config import ProposeConfig
from clincot.jsonl import read_records, write_records
from clincot.records import Question, Region
from clincot.stages.base import Metrics, Parts, Paths, Stage, build_progress_path, show_progress
from clincot.stages.parts import join_records, split_questions


def propose(config: ProposeConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.datasets.folder import StudyIndex
    from clincot.generation.grounders import WrittenGrounder
    from clincot.generation.regions import build_grounders, propose_regions
    from clincot.models.rollout_engines import measure_cache_use, open_policy

    questions = show_progress(read_records(inputs["questions"], Question), "regions", "questions")
    log = build_progress_path(outputs["regions"])
    with open_policy(
        inputs["policy"], config.engine, dtype=config.dtype, log=log, inputs=inputs, config=config
    ) as policy:
        grounders = build_grounders(config, policy)
        regions = propose_regions(questions, StudyIndex(inputs["data"]), inputs["data"], grounders, config)
        count = write_records(outputs["regions"], regions)
        off_format = sum(g.off_format for g, _ in grounders if isinstance(g, WrittenGrounder))
        return {"regions": count, "off_format": off_format, **measure_cache_use([policy])}


STAGE = Stage(
    name="propose",
    run=propose,
    config=ProposeConfig,
    inputs=("data", "questions", "policy"),
    outputs=("regions",),
    device="gpu",
    about="Propose regions for every question: hypotheses, grounded in the image, and the whole image.",
    parts=Parts(
        split=split_questions,
        run=propose,
        outputs=("regions",),
        join=join_records(Region, "regions"),
    ),
)
