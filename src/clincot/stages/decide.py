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

    gated = deciding.decide_from_files(
        config, inputs, {name: hash_path_or_missing(path) for name, path in sorted(inputs.items())}
    )
    write_records(outputs["evidence"], iter(()) if gated.sides is None else gated.sides.iter_rows())
    with atomic_write(outputs["summary"]) as file:
        file.write(render_decision(gated.decision))
    if gated.spending is not None and gated.asked is not None and "ledger" in inputs:
        append_decision(
            inputs["ledger"], gated.spending, gated.asked
        )  # before the decision: it is never acted on unspent
    write_records(outputs["decision"], [gated.decision])
    return {name: float(gated.decision.verdict == name) for name in ("promote", "keep", "blocked")}


STAGE = Stage(
    name="decide",
    run=decide,
    config=DecideConfig,
    inputs=("benchmark", "champion", "challenger"),
    outputs=("decision", "evidence", "summary"),
    device="cpu",
    about="does the challenger take the champion's place? (the outcomes of both)",
    optional=("blind", "base", "data", "calibration", "panel_report", "panel_report_before", "pair_report", "ledger"),
    may_be_missing=("champion", "challenger"),
    append_only_inputs=("ledger",),
)
