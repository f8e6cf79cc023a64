"""The decision of a run's round, read from the model store."""

from __future__ import annotations

from typing import Any

from clincot.errors import UserError
from clincot.pipelines.ownership import find_owner
from clincot.runs.round_records import find_round_outputs, find_run_round
from clincot.storage.open import open_store


def describe_decision(run: Any, spec: Any) -> str:
    """Return one sentence: what the round of a run decided; "" if the run names no store.

    run, spec: the run and its compiled pipeline, as the API returns them. The store is read with the keys of this
    environment (AWS_…); without them, the sentence says why the decision is not known here.
    """
    arguments = run.runtime_config.parameters if run.runtime_config is not None else None
    owner = find_owner(spec, arguments)
    if owner is None or not owner.store:
        return ""
    try:
        store = open_store(owner.store)
        begun = find_run_round(store, owner.line, run.run_id)
        made = [find_round_outputs(store, owner.line, number) for number in begun.numbers] if begun is not None else []
    except (UserError, OSError) as error:
        return f"decision: not readable here: {error}"
    mine = [outputs for outputs in made if outputs is not None and outputs.run in (run.run_id, "")]
    decided = [f"{outputs.verdict} (round {outputs.number} of {owner.line}, {outputs.decision})" for outputs in mine]
    if not decided:
        return f"decision: none; the run recorded no result of a round of {owner.line} in {owner.store}"
    return f"decision: {', '.join(decided)}"
