"""Write a trained policy as a checkpoint folder, with its log and settings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clincot.errors import UserError
from clincot.jsonl import atomic_write, write_json
from clincot.models.checkpoint import save_processor
from clincot.prompts import PromptFormat, save_prompt_format
from clincot.training.resolved_settings import SETTINGS_FILE, ResolvedSettings, describe_settings
from clincot.training.term_summary import select_last_steps

LOG_FILE = "train_log.json"


class NonFiniteError(UserError, RuntimeError):
    """The loss or its gradient became NaN or infinite; the message names the pairs or rows."""


def build_cosine_schedule(optimiser: torch.optim.Optimizer, warmup_ratio: float, steps: int) -> Any:
    """Linear warm-up over a share of the steps, then half a cosine period that reaches 0 after the last step.

    No step has a rate of 0. The schedule of transformers starts at 0, so a run of one step would learn nothing.
    """
    warmup_steps = round(warmup_ratio * steps)

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, rate)


def get_partial_folder(out_dir: Path) -> Path:
    """The folder in which a checkpoint is written before it is renamed to `out_dir`."""
    return out_dir.with_name(out_dir.name + ".partial")


def name_training_run(out_dir: Path) -> str:
    """What experiment trackers call a training: the last folders of its checkpoint, such as "night/round-01/policy"."""
    return "/".join(out_dir.absolute().parts[-3:]).removesuffix(".partial").strip("/")


def get_events_folder(out_dir: Path) -> Path:
    """Where TensorBoard's files of a training are, beside its checkpoint, unless TENSORBOARD_LOGGING_DIR is set."""
    return out_dir.with_name(out_dir.name.removesuffix(".partial") + ".tensorboard")


def open_partial_folder(out_dir: Path, run: str) -> Path:
    """Open the partial folder for a run (identified by a digest); the leftovers of another run are deleted."""
    folder = get_partial_folder(out_dir)
    marker = folder / "run"
    if folder.exists() and (not marker.is_file() or marker.read_text(encoding="utf-8") != run):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(run, encoding="utf-8")
    return folder


def save_checkpoint(
    model: Any,
    processor: Any,
    views: PromptFormat,
    out_dir: Path,
    *,
    settings: ResolvedSettings,
    log: Sequence[Mapping[str, float]],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write weights, processor, prompt format, log and settings to the partial folder, then rename it to `out_dir`.

    A LoRA is merged into the weights, so that this checkpoint can be the next round's reference as it is. The adapter
    is kept in adapter/ as well, for servers that load it onto the base (`clincot publish --adapter keep`). `weights`
    replaces the model's own weights if these are sharded among processes (training/fsdp.py).
    """
    partial = get_partial_folder(out_dir) / "checkpoint"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = getattr(torch, settings.dtype)
    if hasattr(model, "merge_and_unload"):
        _save_adapter(model, partial / "adapter")
        model = model.merge_and_unload()
    if weights is None:
        model.to(dtype).save_pretrained(partial, safe_serialization=True)
    else:
        # convert each tensor once, so that tied weights are still one tensor and are written once
        converted = {id(tensor): tensor.to(dtype) for tensor in weights.values()}
        state_dict = {name: converted[id(tensor)] for name, tensor in weights.items()}
        model.save_pretrained(partial, state_dict=state_dict, safe_serialization=True)
    save_processor(processor, partial)
    save_prompt_format(partial, views)
    with atomic_write(partial / LOG_FILE) as file:
        json.dump(list(log), file, indent=1)
        file.write("\n")
    write_json(partial / SETTINGS_FILE, describe_settings(settings))
    if out_dir.exists():
        shutil.rmtree(out_dir)
    partial.rename(out_dir)
    shutil.rmtree(get_partial_folder(out_dir))


def _save_adapter(model: Any, folder: Path) -> None:
    """Write PEFT's two files with the same bytes in every process and on every machine."""
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = None  # a path of this machine; the checkpoint's record names the parent
    content["target_modules"] = sorted(content["target_modules"])  # a set, whose order differs between processes
    write_json(path, content)


def average_last_steps(log: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average every metric that each step has over the last tenth of the steps (at least one step)."""
    tail = select_last_steps(log)
    averages = {}
    for name in tail[-1]:
        if name not in {"step", "epoch", "learning_rate"} and all(name in entry for entry in tail):
            averages[name] = sum(entry[name] for entry in tail) / len(tail)
    return averages
