"""Checkpoints in the layout of the original LLaVA code, converted to Hugging Face's Llava class.

LLaVA-Med 1.5 (`llava_mistral`) and HuatuoGPT-Vision 7B (`llava_qwen2`) are published in the layout of their own
repositories, which transformers cannot load. The layouts were read in microsoft/LLaVA-Med 821e1c7 and
FreedomIntelligence/HuatuoGPT-Vision 546b25f (each family's constants name the file), and the mapping of weights follows
transformers' src/transformers/models/llava/convert_llava_weights_to_hf.py (commit 01080c6; release 5.19.0 does not ship
it). Names of the written weights are those of llava-hf/llava-1.5-7b-hf, which transformers and vLLM both load.

The weights are planned from the headers of the files, compared with what LlavaForConditionalGeneration expects, and
then copied group by group, so that memory holds MAX_SHARD_BYTES of them (or one larger tensor), whatever the size of
the model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, CLIPVisionConfig, GenerationConfig, LlavaConfig, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from clincot import __version__
from clincot.fields import FrozenModel
from clincot.jsonl import hash_files, write_json
from clincot.models.checkpoint import UnsupportedCheckpoint, hash_checkpoint, save_processor
from clincot.models.conversion.original_families import OriginalFamily
from clincot.models.conversion.tokenizer import IMAGE_TOKEN, read_tokenizer
from clincot.models.conversion.vision_tower import VisionTower, plan_tower_weights, read_vision_tower
from clincot.models.conversion.weight_files import list_weights, read_json_object
from clincot.models.conversion.weights import TOWER, check_weights, plan_original_weights, write_weights

CONVERSION_RECORD = "conversion.json"
MAX_SHARD_BYTES = 4_000_000_000
VOCABULARY_MULTIPLE = 64  # transformers' script pads the vocabulary to it as well


class ConversionRecord(FrozenModel):
    """What a converted checkpoint was made from (conversion.json)."""

    model_type: str
    source_sha256: str  # hash_checkpoint of the original folder
    vision_tower: str  # name in the original config
    vision_tower_sha256: str | None  # of the weight files of the tower's folder; None: weights are in the original
    ignored_weights: tuple[str, ...]
    image_token_id: int
    source_vocabulary: int
    vocabulary: int  # rows from source_vocabulary on are the mean of the original's rows
    clincot_version: str
    transformers_version: str


def convert_checkpoint(
    source: Path,
    out: Path,
    family: OriginalFamily,
    *,
    vision_tower: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConversionRecord:
    """Write the converted checkpoint to a new folder.

    vision_tower: the folder of the CLIP model that the original config names. It is needed if the original does not
    contain the tower's weights, or names a tower whose config is unknown here. Weights in the original take precedence.
    Raises UnsupportedCheckpoint, naming the field, file or weight; then nothing is left at `out`.
    """
    if out.exists():
        raise UnsupportedCheckpoint(f"{out}: exists already; name a folder that does not")
    original = read_json_object(source / "config.json")
    check_original_config(original, family, source)
    planned, ignored = plan_original_weights(source)
    has_tower = any(one.name.startswith(TOWER) for one in planned)
    tower = read_vision_tower(source, original, vision_tower)
    if not has_tower:
        planned += plan_tower_weights(source, original, tower)
    tokenizer = read_tokenizer(source, family)
    config = build_llava_config(original, family, tower.config, tokenizer)
    planned = check_weights(planned, config, int(original["vocab_size"]), source)
    record = ConversionRecord(
        model_type=family.model_type,
        source_sha256=hash_checkpoint(source),
        vision_tower=original["mm_vision_tower"],
        vision_tower_sha256=None if has_tower or tower.folder is None else hash_files(*list_weights(tower.folder)),
        ignored_weights=ignored,
        image_token_id=config.image_token_index,
        source_vocabulary=original["vocab_size"],
        vocabulary=config.text_config.vocab_size,
        clincot_version=__version__,
        transformers_version=transformers.__version__,
    )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_weights(planned, partial, config.text_config.vocab_size, max_shard_bytes)
        config.save_pretrained(partial)
        build_generation_config(source, tokenizer).save_pretrained(partial)
        save_processor(build_processor(original, family, tower, tokenizer), partial)
        write_json(partial / CONVERSION_RECORD, record.model_dump())
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return record


def check_original_config(original: Mapping[str, Any], family: OriginalFamily, source: Path) -> None:
    """Raise UnsupportedCheckpoint, naming the field, if the original computes something that Llava does not."""
    where = source / "config.json"
    allowed: dict[str, tuple[Any, ...]] = {
        "model_type": (family.model_type,),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_use_im_start_end": (False, None),
        "mm_vision_select_feature": ("patch", None),
        "mm_resampler_type": (None,),
        "image_aspect_ratio": ("pad", "square", None),  # anyres: tiles, which are LLaVA-NeXT's
        "quantization_config": (None,),
    }
    for name, values in allowed.items():
        value = original.get(name)
        if value not in values:
            expected = " or ".join(json.dumps(one) for one in values if one is not None) or "none"
            raise UnsupportedCheckpoint(
                f"{where}: {name} is {json.dumps(value)}, and `convert {family.name}` reads {expected}"
            )
    for name, kind in (("vocab_size", int), ("mm_vision_tower", str)):
        if not isinstance(original.get(name), kind):
            raise UnsupportedCheckpoint(
                f"{where}: {name} is {json.dumps(original.get(name))}, expected {kind.__name__}"
            )
    layer = original.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise UnsupportedCheckpoint(f"{where}: mm_vision_select_layer is {json.dumps(layer)}, expected one layer")


def build_llava_config(
    original: Mapping[str, Any], family: OriginalFamily, vision: CLIPVisionConfig, tokenizer: Any
) -> LlavaConfig:
    """The config of the converted checkpoint; its vocabulary has room for the image token."""
    text_class = CONFIG_MAPPING[family.text_type]
    known = {*text_class().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures", "dtype"}
    text = {name: value for name, value in original.items() if name in known}
    text["vocab_size"] = count_vocabulary(int(original["vocab_size"]), len(tokenizer))
    text["pad_token_id"] = tokenizer.pad_token_id
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        dtype=original.get("torch_dtype") or original.get("dtype"),
        vision_config=vision.to_dict(),
        text_config=text_class(**text).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=original.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )


def count_vocabulary(rows: int, tokens: int) -> int:
    """Rows of the embeddings: as many as before where they suffice, otherwise padded to VOCABULARY_MULTIPLE."""
    return rows if tokens <= rows else math.ceil(tokens / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def build_processor(
    original: Mapping[str, Any], family: OriginalFamily, tower: VisionTower, tokenizer: Any
) -> LlavaProcessor:
    """The tower's image processing, padding to a square with the mean colour where the original pads."""
    pads = family.always_pads or original.get("image_aspect_ratio") == "pad"
    return LlavaProcessor(
        LlavaImageProcessorPil(**tower.image_processor, do_pad=pads),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=family.chat_template,
        image_token=IMAGE_TOKEN,
    )


def build_generation_config(source: Path, tokenizer: Any) -> GenerationConfig:
    """End tokens of the tokenizer and of the original's generation config; nothing else of it is kept."""
    path = source / "generation_config.json"
    listed = read_json_object(path).get("eos_token_id") if path.is_file() else None
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    ids = sorted(ends)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ids if len(ids) > 1 else ids[0],
        pad_token_id=tokenizer.pad_token_id,
    )
