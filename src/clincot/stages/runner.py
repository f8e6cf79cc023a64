"""Run one stage over named files, unless its outputs are up to date."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clincot import __version__
from clincot.config import Section
from clincot.jsonl import BadRecord, write_json
from clincot.records import digest_of
from clincot.stages.base import Metrics, Paths, Stage
from clincot.stages.catalog import stage_named
from clincot.storage.digests import digest_or_missing, path_digest


def run_stage(name: str, section: Section, inputs: Paths, outputs: Paths) -> Metrics:
    """Run a stage unless its outputs are already those of the same inputs, section and version; returns its metrics.

    Beside the first output lies a stamp, <output>.stage.json, written when the stage ended well. Raises BadRecord where
    a path is missing or not one of the stage's.
    """
    stage = stage_named(name)
    _check_paths(stage, inputs, outputs)
    named = {str(path): path_digest(path) for path in section.files if path.exists()}
    key = digest_of(
        [
            name,
            __version__,
            section.model_dump(mode="json"),
            named,
            {
                n: "" if n in stage.appends_to else digest_or_missing(p)
                for n, p in sorted(inputs.items())
                if n not in stage.beside
            },
        ]
    )
    stamp = outputs[stage.outputs[0]].with_name(outputs[stage.outputs[0]].name + ".stage.json")
    done = _read_stamp(stamp)
    again = stage.always or bool({*inputs} & {*stage.appends_to})  # it knows itself what it has done before
    if not again and done is not None and done["key"] == key and _unchanged(done["outputs"], outputs):
        metrics: Metrics = done["metrics"]
        return metrics
    stamp.unlink(missing_ok=True)
    metrics = stage.run(section, inputs, outputs)
    written = {n: path_digest(p) for n, p in sorted(outputs.items())}
    write_json(stamp, {"stage": name, "key": key, "outputs": written, "metrics": metrics})
    return metrics


def _check_paths(stage: Stage, inputs: Paths, outputs: Paths) -> None:
    known = {*stage.inputs, *stage.optional}
    wrong = sorted({*inputs} - known) + sorted({*outputs} ^ set(stage.outputs)) + sorted(set(stage.inputs) - {*inputs})
    if wrong:
        raise BadRecord(
            f"stage {stage.name}: inputs are {stage.inputs} (optional {stage.optional}), outputs {stage.outputs}; "
            f"missing or unknown: {', '.join(wrong)}"
        )
    for name, path in inputs.items():
        if not path.exists() and name not in stage.may_lack:
            raise BadRecord(f"stage {stage.name}: input {name!r}: {path} does not exist")


def _read_stamp(stamp: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(stamp.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content


def _unchanged(written: Mapping[str, str], outputs: Paths) -> bool:
    return all(path.exists() and written.get(name) == path_digest(path) for name, path in outputs.items())
