"""The preflight stage: check everything a round needs before any GPU is requested."""

from __future__ import annotations

from clincot.config import PreflightConfig
from clincot.stages.base import Metrics, Paths, Stage


def preflight(config: PreflightConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.preflight.checklist import run_preflight

    return run_preflight(config, inputs, outputs)


STAGE = Stage(
    name="preflight",
    run=preflight,
    config=PreflightConfig,
    inputs=(),
    outputs=("report", "table", "champion"),
    device="cpu",
    about="Check stores, data sets, judges, champion, cluster and disk, and report all failures at once.",
    optional=("service", "launch"),
    never_cached=True,
    flags=("base", "data", "benchmark", "calibration"),
)
