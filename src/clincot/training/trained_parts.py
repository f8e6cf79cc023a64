"""Which parts of a model are trained: language model, projector (connector) and vision tower, in every family.

The names are those of transformers 5.19.0 (models/*/modeling_*.py): Llava, LlavaNext, LlavaOnevision, InternVL, Gemma3
and PaliGemma have `vision_tower` and `multi_modal_projector`; Idefics3 and SmolVLM `vision_model` and `connector`. In
Qwen2-VL, Qwen2.5-VL and Qwen3-VL the projector is inside the tower `visual`, as `merger` (and `deepstack_merger_list`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from clincot.errors import InvalidInput

_TOWER_NAMES = ("vision_model", "vision_tower", "visual")
_PROJECTOR_NAMES = ("multi_modal_projector", "connector")
_PROJECTOR_NAMES_IN_TOWER = ("merger", "deepstack_merger_list")


class LoraSettings(Protocol):
    """The part of the settings that shapes a LoRA."""

    @property
    def lora_r(self) -> int: ...

    @property
    def lora_alpha(self) -> int: ...


def find_towers(model: Any) -> dict[str, nn.Module]:
    """The vision tower by its name in the model. Raises InvalidInput if none has a known name."""
    towers = _list_submodules(_get_inner_model(model), _TOWER_NAMES)
    if not towers:
        raise InvalidInput(
            f"{type(model).__name__} has none of {_TOWER_NAMES}, so its vision tower cannot be identified"
        )
    return towers


def find_projectors(model: Any) -> dict[str, nn.Module]:
    """The modules between vision tower and language model, by name. Raises InvalidInput if none has a known name."""
    inner = _get_inner_model(model)
    projectors = _list_submodules(inner, _PROJECTOR_NAMES)
    for tower_name, tower in find_towers(model).items():
        for name, module in _list_submodules(tower, _PROJECTOR_NAMES_IN_TOWER).items():
            parts = module.named_children() if isinstance(module, nn.ModuleList) else [("", module)]
            projectors |= {".".join(filter(None, (tower_name, name, part))): part_of for part, part_of in parts}
    if not projectors:
        known = (*_PROJECTOR_NAMES, *_PROJECTOR_NAMES_IN_TOWER)
        raise InvalidInput(f"{type(model).__name__} has none of {known}, so its projector cannot be identified")
    return projectors


def freeze_modules(model: Any, *, vision: bool, projector: bool) -> None:
    """Freeze the vision tower and/or the projector; the language model is always trained.

    Parameters that belong to no named part (LlavaNext's image_newline) count as the projector's. Raises InvalidInput if
    the model has no vision tower or no projector under a known name.
    """
    towers, projectors = find_towers(model), find_projectors(model)
    model.requires_grad_(not projector)
    for tower in towers.values():
        tower.requires_grad_(not vision)
    for module in projectors.values():  # after the towers, which contain it in some families
        module.requires_grad_(not projector)
    model.get_decoder().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)


def may_leave_parameters_unused(model: Any) -> bool:
    """Whether a forward pass may skip trained parameters.

    Language model, output head and projector take part in every forward pass. A vision tower may have layers that do
    not (CLIP's last ones, SigLIP's pooling head), as may parameters of no named part (LlavaNext's image_newline).
    """
    used: set[int] = set()
    for module in (model.get_decoder(), model.get_output_embeddings(), *find_projectors(model).values()):
        used |= set(map(id, module.parameters()))
    return any(parameter.requires_grad and id(parameter) not in used for parameter in model.parameters())


def build_lora_config(model: Any, settings: LoraSettings) -> Any:
    """A LoRA on every linear layer that is trained, and a trained copy of the projector if it is trained.

    The projector is not decomposed, as in LLaVA and MMedPO (LLaVA's find_all_linear_names leaves it out). The output
    head is left out because TRL reads its weight directly.
    """
    from peft import LoraConfig

    head = model.get_output_embeddings()
    projectors = {name: module for name, module in find_projectors(model).items() if _is_trained(module)}
    in_projectors: set[int] = set()
    for projector in projectors.values():
        in_projectors |= set(map(id, projector.modules()))
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and id(module) not in in_projectors
        and module.weight.requires_grad
    ]
    prefix = "model." if _get_inner_model(model) is not model else ""
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,
        modules_to_save=[prefix + name for name in projectors] or None,
        task_type="CAUSAL_LM",
    )


def keep_trained_weights_in_float32(model: nn.Module) -> None:
    """Convert trained weights on a bfloat16 base (LoRA, projector) to float32: small updates are lost in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def set_projector_rate(optimiser: torch.optim.Optimizer, model: Any, lr: float) -> None:
    """Give the projector's parameters a learning rate of their own, in parameter groups behind the existing ones."""
    projector = {id(parameter) for parameter in list_projector_parameters(model)}
    for group in list(optimiser.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in projector]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in projector]
            optimiser.add_param_group({**group, "params": moved, "lr": lr})


def list_projector_parameters(model: Any) -> list[nn.Parameter]:
    """The trained parameters of the projector, also of a model with a LoRA."""
    base = get_base_model(model)
    parameters = list(_get_inner_model(base).parameters(recurse=False))
    for projector in find_projectors(base).values():
        parameters += projector.parameters()
    return [parameter for parameter in parameters if parameter.requires_grad]


def get_base_model(model: Any) -> Any:
    """The model under a LoRA, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _get_inner_model(model: Any) -> Any:
    return getattr(model, "model", model)


def _list_submodules(module: Any, names: Iterable[str]) -> dict[str, nn.Module]:
    children = ((name, getattr(module, name, None)) for name in names)
    return {name: child for name, child in children if isinstance(child, nn.Module)}


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
