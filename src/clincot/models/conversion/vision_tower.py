"""The CLIP tower of an original checkpoint: its config, its image processing, and weights in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig

from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.conversion.weight_files import PlannedTensor, read_headers, read_json_object
from clincot.models.conversion.weights import IGNORED, TOWER

# The tower that both models use, by its name on the hub: the default vision config of transformers 5.19.0,
# models/llava/configuration_llava.py.
CLIP_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
IMAGE_FIELDS = (  # of preprocessor_config.json
    "size",
    "crop_size",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
)
CLIP_336_NAME = re.compile(r"(^|/)clip[-_]vit[-_]large[-_]patch14[-_]336$")


@dataclass(frozen=True)
class VisionTower:
    """Config and image processing of a vision tower, and the folder that they come from."""

    config: CLIPVisionConfig
    image_processor: dict[str, Any]
    folder: Path | None


def read_vision_tower(source: Path, original: Mapping[str, Any], folder: Path | None) -> VisionTower:
    """The tower's config and image processing, without its weights.

    From `folder`, or the folder in the original that the config names (HuatuoGPT-Vision), or known by name.
    """
    name = original["mm_vision_tower"]
    if folder is None and (source / name / "config.json").is_file():
        folder = source / name
    if folder is None and not CLIP_336_NAME.search(name):
        raise UnsupportedCheckpoint(
            f"{source}: mm_vision_tower is {name!r}, whose config is unknown here; name its folder with --vision-tower"
        )
    if folder is None:
        config = CLIPVisionConfig(**CLIP_336)
    else:
        content = read_json_object(folder / "config.json")
        content = content.get("vision_config") or content  # a whole CLIP model, or its vision part
        if content.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise UnsupportedCheckpoint(
                f"{folder / 'config.json'}: model_type is {content.get('model_type')!r}; only CLIP towers are converted"
            )
        config = CLIPVisionConfig.from_dict(content)
    processing: dict[str, Any] = {"size": {"shortest_edge": config.image_size}}
    processing["crop_size"] = {"height": config.image_size, "width": config.image_size}
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        described = read_json_object(folder / "preprocessor_config.json")
        processing |= {key: described[key] for key in IMAGE_FIELDS if key in described}
    return VisionTower(config, processing, folder)


def plan_tower_weights(source: Path, original: Mapping[str, Any], tower: VisionTower) -> list[PlannedTensor]:
    """The tower's weights from its own folder, for an original that does not contain them."""
    if tower.folder is None:
        raise UnsupportedCheckpoint(
            f"{source}: contains no weights of the vision tower (model.vision_tower.*), which the original loads from "
            f"{original['mm_vision_tower']!r}; name a folder with that model with --vision-tower"
        )
    planned = []
    for one in read_headers(tower.folder):
        if IGNORED.fullmatch(one.key) or one.key.startswith(("text_model.", "text_projection.", "visual_projection.")):
            continue
        if one.key != "logit_scale":  # of a whole CLIP model, like the prefixes above
            planned.append(replace(one, name=TOWER + one.key.removeprefix("vision_model.")))
    return planned
