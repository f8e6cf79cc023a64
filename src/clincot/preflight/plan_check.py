"""What the round will cost, as one line of the preflight's table (clincot.planning)."""

from __future__ import annotations

from pathlib import Path

from clincot.config import Params, PreflightConfig
from clincot.errors import UserError
from clincot.preflight.preflight_report import PreflightCheck, pass_check, skip_check

_PROBE = "GPU-hours, memory and storage of one round, as `clincot plan` estimates them"


def check_plan(config: PreflightConfig, data: Path, benchmark: Path) -> PreflightCheck:
    """Say what the round costs. It never fails: a model whose size is not known makes the check skipped."""
    if not config.base:
        return skip_check("plan", _PROBE, "no base policy is configured (preflight.base), so its size is not known")
    from clincot.planning.cost_plan import PlanRequest, make_plan  # imports torch
    from clincot.planning.gpu_table import DEFAULT_GPU, read_gpus
    from clincot.planning.plan_text import summarize_plan

    # one round, of as many questions as a subset has
    prepare = config.prepare
    params = Params(
        prepare=prepare,
        propose=config.propose,
        answer=config.answer,
        judge=config.judge,
        pair=config.pair,
        train=config.train,
        evaluate=config.evaluate,
    )
    request = PlanRequest(params, data, benchmark, read_gpus()[DEFAULT_GPU], policy=config.base, rounds=1)
    try:
        return pass_check("plan", _PROBE, summarize_plan(make_plan(request)))
    except UserError as error:
        return skip_check("plan", _PROBE, str(error))
