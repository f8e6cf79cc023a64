"""A round's files, wherever its tasks left them, as a run folder: the page, the benchmark table and the digests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clincot.config import Params, parse_config
from clincot.jsonl import atomic_write, read_json_model, read_records, write_json
from clincot.judging.combination import PanelReport
from clincot.records import Decision
from clincot.reporting.page import write_page
from clincot.rounds import Plan, collect_results, render_results_table, start_run
from clincot.runs import history
from clincot.storage.artifacts import download_folder
from clincot.storage.digests import hash_path
from clincot.storage.open import open_store

_ROUND_FILES = {  # output of a task -> its name in a round's folder, as rounds.py has it
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


def write_round_page(
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
) -> history.RoundOutputs:
    """Write the page (HTML) and the benchmark table (Markdown) of one round; keep in the store what it made.

    made: paths by the names above; champion: paths of the outcomes and report of the policy that it is held against;
    policy: address of the policy that it started from.
    """
    from clincot.pipelines.params import decode_params

    parsed = parse_config(
        Params, {name: decode_params(one) for name, one in params.items()}, where="pipeline parameters"
    )
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        plan = Plan(
            run=run,
            data=download_folder(data),
            benchmark=download_folder(benchmark),
            policy=download_folder(policy),
            params=parsed,
            count=1,
            blind_from=download_folder(blind_from) if blind_from else None,
        )
        run.mkdir()
        start_run(plan)
        folder = run / "round-01"
        for name, path in made.items():
            _link_file(Path(path), folder / _ROUND_FILES[name])
        for name, path in champion.items():
            _link_file(Path(path), run / "base" / _ROUND_FILES[name])
        gathered = collect_results(plan)
        write_json(run / "results.json", gathered)
        write_page(run, page, title=f"ClinCoT: round {number}")
    with atomic_write(results) as file:
        file.write(render_results_table(gathered) + "\n")
    (decision,) = read_records(Path(made["decision"]), Decision)
    digests = {name: hash_path(Path(path)) for name, path in sorted(made.items())}
    panel = read_json_model(Path(made["panel_report"]), PanelReport) if "panel_report" in made else None
    kept = history.RoundOutputs(
        number=number,
        digests=digests,
        decision=decision.id,
        verdict=decision.verdict,
        agreement=panel.alpha_calibrated.value if panel else None,
    )
    if parsed.publish.store:
        history.record_round_outputs(open_store(parsed.publish.store), parsed.publish.name, kept)
    return kept


def _link_file(path: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(path.absolute(), link)
