"""What of a policy is trained, and how a trained policy becomes a checkpoint folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clincot.config import TrainConfig
from clincot.errors import InvalidInput, UserError
from clincot.jsonl import atomic_write, write_json
from clincot.prompts import PromptFormat, save_prompt_format

LOG_FILE = "train_log.json"
_VISION_TOWER_NAMES = ("vision_model", "vision_tower", "visual")  # what transformers' families call it


class NonFiniteError(UserError, RuntimeError):
    """The loss or its gradient became NaN or infinite; names the pairs or rows."""


def freeze_modules(model: Any, *, vision: bool, connector: bool) -> None:
    """Freeze the vision tower and the connector (projector) as told; everything else is trained."""
    inner = getattr(model, "model", model)
    towers = [getattr(inner, name) for name in _VISION_TOWER_NAMES if isinstance(getattr(inner, name, None), nn.Module)]
    if not towers:
        raise InvalidInput(
            f"{type(model).__name__} has none of {_VISION_TOWER_NAMES}, so its vision tower cannot be told apart"
        )
    model.requires_grad_(not connector)  # what is left over is the connector, whatever a family calls it
    for tower in towers:
        tower.requires_grad_(not vision)
    model.get_decoder().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)


def build_lora_config(model: Any, config: TrainConfig) -> Any:
    """A LoRA on every linear layer of what is trained, without the output head (TRL reads its weight directly)."""
    from peft import LoraConfig

    head = model.get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.weight.requires_grad
    ]
    return LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )


def build_cosine_schedule(optimiser: torch.optim.Optimizer, warmup_ratio: float, steps: int) -> Any:
    """Linear warm-up over a share of the steps, then a half cosine down to 0 after the last one.

    No step is taken at a rate of 0 (transformers' own starts there, so that a run of one step would learn nothing).
    """
    warm = round(warmup_ratio * steps)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, rate)


def get_partial_folder(out_dir: Path) -> Path:
    """Where a checkpoint is made before it appears under its own name."""
    return out_dir.with_name(out_dir.name + ".partial")


def open_partial_folder(out_dir: Path, run: str) -> Path:
    """The partial folder of this run (named by a digest); what another run left there is thrown away, not resumed."""
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
    dtype: str,
    log: Sequence[Mapping[str, float]],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write weights, processor, views and training log aside, then put the folder in place of `out_dir`.

    A LoRA is merged into the weights, so that the next round's reference is simply this checkpoint; the adapter is kept
    beside them, in adapter/, for servers that load it onto the base (`clincot publish --adapter keep`). `weights` are
    the model's where its own are split among processes (training/fsdp.py).
    """
    making = get_partial_folder(out_dir) / "checkpoint"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    if hasattr(model, "merge_and_unload"):
        _save_adapter(model, making / "adapter")
        model = model.merge_and_unload()
    if weights is None:
        model.to(getattr(torch, dtype)).save_pretrained(making, safe_serialization=True)
    else:
        made = {id(tensor): tensor.to(getattr(torch, dtype)) for tensor in weights.values()}  # tied ones stay tied
        whole = {name: made[id(tensor)] for name, tensor in weights.items()}
        model.save_pretrained(making, state_dict=whole, safe_serialization=True)
    processor.save_pretrained(making)
    save_prompt_format(making, views)
    with atomic_write(making / LOG_FILE) as file:
        json.dump(list(log), file, indent=1)
        file.write("\n")
    if out_dir.exists():
        shutil.rmtree(out_dir)
    making.rename(out_dir)
    shutil.rmtree(get_partial_folder(out_dir))


def _save_adapter(model: Any, folder: Path) -> None:
    """PEFT's two files, their bytes the same in every process and on every machine."""
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = None  # a path of this machine; the checkpoint's record names the parent
    content["target_modules"] = sorted(content["target_modules"])  # a set: in another order in every process
    write_json(path, content)


def average_last_steps(log: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Every metric averaged over the last tenth of the steps (at least one)."""
    tail = log[-max(1, len(log) // 10) :]
    names = [name for name in tail[-1] if name not in {"step", "epoch", "learning_rate"}]
    return {name: sum(entry[name] for entry in tail) / len(tail) for name in names}
