"""The pair stage: scored candidates become preference pairs."""

from __future__ import annotations

from clincot.config import PairConfig
from clincot.jsonl import read_records, write_json, write_records
from clincot.records import Candidate, PanelScore
from clincot.stages.base import Metrics, Paths, Stage


def pair(config: PairConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.preferences.pairs import make_pairs

    candidates = read_records(inputs["candidates"], Candidate)
    pairs, report = make_pairs(candidates, read_records(inputs["scores"], PanelScore), config)
    write_records(outputs["pairs"], pairs)
    write_json(outputs["pair_report"], report.model_dump(mode="json"))
    return {"pairs": len(pairs)}


STAGE = Stage(
    name="pair",
    run=pair,
    config=PairConfig,
    inputs=("candidates", "scores"),
    outputs=("pairs", "pair_report"),
    device="cpu",
    about="Make preference pairs, with their score gaps, from the scored candidates.",
)
