"""A round's files, wherever its tasks left them, as a run folder: the page, the benchmark table and the digests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clincot.config import Params, parse_section
from clincot.jsonl import read_model, read_records, write_json, written_aside
from clincot.judging.combination import PanelReport
from clincot.records import Decision
from clincot.reporting.page import write_page
from clincot.rounds import Plan, collect, start_run, table
from clincot.runs import history
from clincot.storage.artifacts import fetch
from clincot.storage.digests import path_digest
from clincot.storage.open import open_store

_FILES = {  # output of a task -> its name in a round's folder, as rounds.py has it
    "questions": "questions.jsonl",
    "regions": "regions.jsonl",
    "candidates": "candidates.jsonl",
    "judgements": "judgements.jsonl",
    "scores": "scores.jsonl",
    "panel_report": "panel.report.json",
    "pairs": "pairs.jsonl",
    "pair_report": "pairs.report.json",
    "version": "version.json",
    "checkpoint": "policy",
    "outcomes": "outcomes.jsonl",
    "report": "report.json",
    "decision": "decision.json",
    "summary": "decision.md",
    "evidence": "evidence.jsonl",
}


def show_round(
    params: Mapping[str, Mapping[str, Any]],
    *,
    number: int,
    data: str,
    benchmark: str,
    blind_from: str,
    policy: str,
    made: Mapping[str, str],
    champion: Mapping[str, str],
    page: Path,
    results: Path,
) -> history.Made:
    """Write the page (HTML) and the benchmark table (Markdown) of one round; keep in the store what it made.

    made: paths by the names above; champion: paths of the outcomes and report of the policy that it is held against;
    policy: address of the policy that it started from.
    """
    from clincot.pipelines.params import decoded

    parsed = parse_section(Params, {name: decoded(one) for name, one in params.items()}, where="pipeline parameters")
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        plan = Plan(
            run=run,
            data=fetch(data),
            benchmark=fetch(benchmark),
            policy=fetch(policy),
            params=parsed,
            count=1,
            blind_from=fetch(blind_from) if blind_from else None,
        )
        run.mkdir()
        start_run(plan)
        folder = run / "round-01"
        for name, path in made.items():
            _link(Path(path), folder / _FILES[name])
        for name, path in champion.items():
            _link(Path(path), run / "base" / _FILES[name])
        gathered = collect(plan)
        write_json(run / "results.json", gathered)
        write_page(run, page, title=f"ClinCoT: round {number}")
    with written_aside(results) as file:
        file.write(table(gathered) + "\n")
    (decision,) = read_records(Path(made["decision"]), Decision)
    digests = {name: path_digest(Path(path)) for name, path in sorted(made.items())}
    panel = read_model(Path(made["panel_report"]), PanelReport) if "panel_report" in made else None
    kept = history.Made(
        number=number,
        digests=digests,
        decision=decision.id,
        verdict=decision.verdict,
        agreement=panel.alpha_calibrated.value if panel else None,
    )
    if parsed.publish.store:
        history.record_made(open_store(parsed.publish.store), parsed.publish.name, kept)
    return kept


def _link(path: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(path.absolute(), link)
