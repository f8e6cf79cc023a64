"""Weights of an original checkpoint under the names of the Llava class, checked against it and copied in groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from clincot.jsonl import write_json
from clincot.models.checkpoint import WEIGHTS_INDEX, UnsupportedCheckpoint
from clincot.models.conversion.weight_files import PlannedTensor, count_bytes, list_some, read_headers

EMBEDDINGS, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
TOWER = "vision_tower.vision_model."

# (pattern of an original name, its replacement); the first pattern that matches the beginning of a name applies
RENAMES = (
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
# Weights that take no part in the original's forward pass: buffers that transformers computes, and the line break of
# tiled pictures, which transformers' script drops as well (tiles are refused by check_original_config).
IGNORED = re.compile(r".*\.inv_freq|.*\.position_ids|model\.image_newline")
# Names of transformers' modules in memory (5.19.0) by the beginning of the written names.
MEMORY_NAMES = {
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.vision_tower.": TOWER,
    "lm_head.": "language_model.lm_head.",
}


def plan_original_weights(source: Path) -> tuple[list[PlannedTensor], tuple[str, ...]]:
    """(weights under their new names, names that are left out). Raises UnsupportedCheckpoint for an unknown name."""
    planned, ignored, unknown = [], [], []
    for one in read_headers(source):
        name = rename_weight(one.key)
        if IGNORED.fullmatch(one.key):
            ignored.append(one.key)
        elif name is None:
            unknown.append(one.key)
        else:
            planned.append(replace(one, name=name))
    if unknown:
        raise UnsupportedCheckpoint(f"{source}: {list_some(unknown)}: not a weight of the original layout")
    return planned, tuple(sorted(ignored))


def rename_weight(key: str) -> str | None:
    """The name of an original weight in the Llava class; None if the layout has no such weight."""
    for pattern, replacement in RENAMES:
        if match := re.match(pattern, key):
            return replacement + key[match.end() :]
    return None


def check_weights(
    planned: Sequence[PlannedTensor], config: LlavaConfig, vocabulary: int, source: Path
) -> list[PlannedTensor]:
    """The weights to write. Raises UnsupportedCheckpoint if names or shapes are not exactly the class's own."""
    expected = list_expected_shapes(config)
    for name in (EMBEDDINGS, LM_HEAD):
        if name in expected:
            expected[name] = (vocabulary, *expected[name][1:])
    if config.tie_word_embeddings:  # the embeddings again, where the original wrote them twice
        planned = [one for one in planned if one.name != LM_HEAD]
    names = {one.name for one in planned}
    if missing := sorted(set(expected) - names):
        raise UnsupportedCheckpoint(f"{source}: lacks {list_some(missing)} (names after conversion)")
    if unexpected := [one.key for one in planned if one.name not in expected]:
        raise UnsupportedCheckpoint(f"{source}: {list_some(unexpected)}: the config describes no such weight")
    for one in planned:
        if one.shape != expected[one.name]:
            raise UnsupportedCheckpoint(
                f"{one.file}: {one.key} has shape {list(one.shape)}, and by the config {list(expected[one.name])}"
            )
    return list(planned)


def list_expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """{name in the written files: shape} of every weight of the class; allocates no memory."""
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    shapes = {}
    for name, weight in state.items():
        prefix = next(prefix for prefix in MEMORY_NAMES if name.startswith(prefix))
        shapes[MEMORY_NAMES[prefix] + name.removeprefix(prefix)] = tuple(weight.shape)
    if config.tie_word_embeddings:
        shapes.pop(LM_HEAD, None)
    return shapes


def write_weights(planned: Sequence[PlannedTensor], out: Path, vocabulary: int, max_shard_bytes: int) -> None:
    """Copy the weights in groups of at most max_shard_bytes, each into a file of its own, and write their index."""
    groups = group_by_size(planned, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        tensors = {one.name: _read_tensor(one, vocabulary) for one in group}
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(groups) > 1:
        total = sum(count_bytes(one) for one in planned)
        write_json(out / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def group_by_size(planned: Sequence[PlannedTensor], most: int) -> list[list[PlannedTensor]]:
    """Consecutive groups of at most `most` bytes; a larger tensor is a group by itself."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for one in planned:
        if groups[-1] and size + count_bytes(one) > most:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += count_bytes(one)
    return groups


def _read_tensor(planned: PlannedTensor, vocabulary: int) -> torch.Tensor:
    with safe_open(planned.file, framework="pt") as weights:
        tensor: torch.Tensor = weights.get_tensor(planned.key)
    return extend_vocabulary(tensor, vocabulary) if planned.name in (EMBEDDINGS, LM_HEAD) else tensor


def extend_vocabulary(weight_VH: torch.Tensor, rows: int) -> torch.Tensor:
    """Weights with new rows at the end, each the mean of the original rows (V vocabulary, H hidden size).

    The image token's row is never read: picture features replace it. In the output layer the new tokens' logits are
    the mean of the others, so by Jensen's inequality they lower every log-probability by at most log(1 + new/old).
    transformers' script draws around the mean instead; the mean itself is the same in every run.
    """
    if rows == len(weight_VH):
        return weight_VH
    mean_H = weight_VH.double().mean(0) if weight_VH.dtype == torch.float32 else weight_VH.float().mean(0)
    return torch.cat([weight_VH, mean_H.to(weight_VH.dtype).expand(rows - len(weight_VH), -1)])
