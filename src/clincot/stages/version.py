"""The version stage: commit the preference data to its git and DVC repository."""

from __future__ import annotations

from clincot.config import VersionConfig
from clincot.jsonl import write_records
from clincot.stages.base import Metrics, Paths, Stage


def version(config: VersionConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.preferences.versions.commit import commit_version

    data = commit_version(config, inputs, outputs["version"])
    write_records(outputs["version"], [data])
    return {"versioned": float(bool(data.revision)), "pairs": data.pairs, "files": len(data.files), "bytes": data.size}


STAGE = Stage(
    name="version",
    run=version,
    config=VersionConfig,
    inputs=("questions", "regions", "candidates", "judgements", "scores", "panel_report", "pairs", "pair_report"),
    outputs=("version",),
    device="cpu",
    about="Push the preference data to the data repository, verify it, commit it and tag the commit.",
    optional=("steps", "origin"),
    never_cached=True,
    flags=("repository", "round"),
)
