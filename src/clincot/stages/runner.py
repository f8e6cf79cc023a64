"""Run one stage over named files, unless its outputs are up to date."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clincot import __version__
from clincot.config import FrozenConfig
from clincot.jsonl import InvalidRecord, write_json
from clincot.records import hash_json
from clincot.stages.base import Metrics, Paths, Stage
from clincot.stages.catalog import get_stage
from clincot.storage.digests import hash_path, hash_path_or_missing


def run_stage(name: str, config: FrozenConfig, inputs: Paths, outputs: Paths) -> Metrics:
    """Run a stage unless its outputs are already those of the same inputs, section and version; returns its metrics.

    Beside the first output lies a stamp, <output>.stage.json, written when the stage ended well. Raises BadRecord where
    a path is missing or not one of the stage's.
    """
    stage = get_stage(name)
    _check_paths(stage, inputs, outputs)
    named = {str(path): hash_path(path) for path in config.files if path.exists()}
    key = hash_json(
        [
            name,
            __version__,
            config.model_dump(mode="json"),
            named,
            {
                n: "" if n in stage.append_only_inputs else hash_path_or_missing(p)
                for n, p in sorted(inputs.items())
                if n not in stage.provenance_inputs
            },
        ]
    )
    stamp = outputs[stage.outputs[0]].with_name(outputs[stage.outputs[0]].name + ".stage.json")
    done = _read_stamp(stamp)
    again = stage.never_cached or bool(
        {*inputs} & {*stage.append_only_inputs}
    )  # it knows itself what it has done before
    if not again and done is not None and done["key"] == key and _outputs_match(done["outputs"], outputs):
        metrics: Metrics = done["metrics"]
        return metrics
    stamp.unlink(missing_ok=True)
    metrics = stage.run(config, inputs, outputs)
    written = {n: hash_path(p) for n, p in sorted(outputs.items())}
    write_json(stamp, {"stage": name, "key": key, "outputs": written, "metrics": metrics})
    return metrics


def _check_paths(stage: Stage, inputs: Paths, outputs: Paths) -> None:
    known = {*stage.inputs, *stage.optional}
    wrong = sorted({*inputs} - known) + sorted({*outputs} ^ set(stage.outputs)) + sorted(set(stage.inputs) - {*inputs})
    if wrong:
        raise InvalidRecord(
            f"stage {stage.name}: inputs are {stage.inputs} (optional {stage.optional}), outputs {stage.outputs}; "
            f"missing or unknown: {', '.join(wrong)}"
        )
    for name, path in inputs.items():
        if not path.exists() and name not in stage.may_be_missing:
            raise InvalidRecord(f"stage {stage.name}: input {name!r}: {path} does not exist")


def _read_stamp(stamp: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(stamp.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content


def _outputs_match(written: Mapping[str, str], outputs: Paths) -> bool:
    return all(path.exists() and written.get(name) == hash_path(path) for name, path in outputs.items())
