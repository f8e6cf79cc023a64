"""Run one stage over named files, unless its outputs are up to date."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clincot import __version__
from clincot.config import FrozenConfig, resolve_path
from clincot.jsonl import InvalidRecord, write_json
from clincot.models.device_workers import count_devices
from clincot.records import hash_json
from clincot.stages.base import Metrics, Paths, Stage
from clincot.stages.catalog import get_stage
from clincot.stages.parts import run_in_parts
from clincot.storage.digests import hash_path, hash_path_or_missing


def run_stage(name: str, config: FrozenConfig, inputs: Paths, outputs: Paths) -> Metrics:
    """Run a stage, or return the metrics of an earlier run with the same inputs, config and version of the package.

    inputs, outputs: paths by name; `shipped:NAME` is resolved. When a stage ends without error, <first
    output>.stage.json records its key and the hashes of its outputs. Raises InvalidRecord if a path is missing or is
    none of the stage's, or if an output would overwrite an input.
    """
    stage = get_stage(name)
    inputs = {name: resolve_path(path) for name, path in inputs.items()}
    _check_paths(stage, inputs, outputs)
    _check_outputs_spare_inputs(stage, inputs, outputs)
    key = _build_key(stage, config, inputs)
    stamp = outputs[stage.outputs[0]].with_name(outputs[stage.outputs[0]].name + ".stage.json")
    done = _read_stamp(stamp)
    always_runs = stage.never_cached or bool({*inputs} & {*stage.append_only_inputs})
    if not always_runs and done is not None and done["key"] == key and _outputs_match(done["outputs"], outputs):
        metrics: Metrics = done["metrics"]
        return metrics
    stamp.unlink(missing_ok=True)
    metrics = _compute(stage, config, inputs, outputs, key)
    written = {n: hash_path(p) for n, p in sorted(outputs.items())}
    write_json(stamp, {"stage": name, "key": key, "outputs": written, "metrics": metrics})
    return metrics


def _compute(stage: Stage, config: FrozenConfig, inputs: Paths, outputs: Paths, key: str) -> Metrics:
    """Run the stage in this process, or divided among several GPUs."""
    if stage.parts is not None and stage.parts.applies(config) and (devices := count_devices()) > 1:
        return run_in_parts(stage.name, stage.parts, config, inputs, outputs, count=devices, key=key)
    return stage.run(config, inputs, outputs)


def _build_key(stage: Stage, config: FrozenConfig, inputs: Paths) -> str:
    """Hash of everything that decides the outputs: code version, config, files that the config names, and inputs."""
    named = {}
    for text in config.named_paths:  # as written, not resolved: the key is the same wherever the package is installed
        path = resolve_path(text)
        if path.exists():
            named[str(Path(text))] = hash_path(path)
    digests = {}
    for name, path in sorted(inputs.items()):
        if name not in stage.provenance_inputs:
            digests[name] = "" if name in stage.append_only_inputs else hash_path_or_missing(path)
    return hash_json([stage.name, __version__, config.model_dump(mode="json"), named, digests])


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


def _check_outputs_spare_inputs(stage: Stage, inputs: Paths, outputs: Paths) -> None:
    """Raise InvalidRecord if an output is an input, is inside an input folder, or contains an input."""
    for output, target in outputs.items():
        for name, source in inputs.items():
            written, read = target.resolve(), source.resolve()
            if written == read:
                relation = "is"
            elif written.is_relative_to(read):
                relation = "is inside"
            elif read.is_relative_to(written):
                relation = "contains"
            else:
                continue
            raise InvalidRecord(
                f"stage {stage.name}: output {output!r} ({target}) {relation} input {name!r} ({source}) and would "
                "overwrite it; choose another path"
            )


def _read_stamp(stamp: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(stamp.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content


def _outputs_match(written: Mapping[str, str], outputs: Paths) -> bool:
    return all(path.exists() and written.get(name) == hash_path(path) for name, path in outputs.items())
