"""The decide stage: promote the challenger, keep the champion, or block."""

from __future__ import annotations

from clincot.config import DecideConfig
from clincot.jsonl import atomic_write, write_records
from clincot.stages.base import Metrics, Paths, Stage
from clincot.storage.digests import hash_path_or_missing


def decide(config: DecideConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.promotion import decision as deciding
    from clincot.promotion.explain import render_decision
    from clincot.promotion.ledger import append_decision

    digests = {name: hash_path_or_missing(path) for name, path in sorted(inputs.items())}
    result = deciding.decide_from_files(config, inputs, digests)
    write_records(outputs["evidence"], iter(()) if result.sides is None else result.sides.iter_rows())
    with atomic_write(outputs["summary"]) as file:
        file.write(render_decision(result.decision))
    if result.spending is not None and result.asked is not None and "ledger" in inputs:
        # Before the decision is written, so that nobody acts on one whose error budget is not spent yet.
        append_decision(inputs["ledger"], result.spending, result.asked)
    write_records(outputs["decision"], [result.decision])
    return {name: float(result.decision.verdict == name) for name in ("promote", "keep", "blocked")}


STAGE = Stage(
    name="decide",
    run=decide,
    config=DecideConfig,
    inputs=("benchmark", "champion", "challenger"),
    outputs=("decision", "evidence", "summary"),
    device="cpu",
    about="Decide whether to promote the challenger.",
    optional=("blind", "base", "data", "calibration", "panel_report", "panel_report_before", "pair_report", "ledger"),
    may_be_missing=("champion", "challenger"),
    append_only_inputs=("ledger",),
)
