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
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AddedToken,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from clincot import __version__
from clincot.fields import FrozenModel
from clincot.jsonl import hash_files, write_json
from clincot.models.checkpoint import WEIGHTS_INDEX, UnsupportedCheckpoint, hash_checkpoint

IMAGE_TOKEN = "<image>"
CONVERSION_RECORD = "conversion.json"
PROBES = ("[INST] Is this <|user|>\n", "\nWhich  zone is the nodule in? 12 %")  # texts before and after a picture
MAX_SHARD_BYTES = 4_000_000_000
VOCABULARY_MULTIPLE = 64  # transformers' script pads the vocabulary to it as well
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
CLIP_336_NAME = re.compile(r"(^|/)clip[-_]vit[-_]large[-_]patch14[-_]336$")

# microsoft/LLaVA-Med 821e1c7, llava/conversation.py: conv_mistral_instruct (separator style LLAMA_2 without a system
# prompt); llava/eval/model_vqa.py puts "<image>\n" in front of the question. A turn's end is " </s>".
MISTRAL_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ ' ' }}{%- else -%}{{ '[INST] ' }}{%- endif -%}
{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}
{%- if message['role'] == 'assistant' -%}{{ ' ' + eos_token }}{%- else -%}{{ ' [/INST]' }}{%- endif -%}
{%- endfor -%}"""
# FreedomIntelligence/HuatuoGPT-Vision 546b25f, cli.py: insert_image_placeholder and preprocess_huatuo. "<|user|>" and
# "<|assistant|>" are ordinary text. A past answer ends with " \n", without an end token.
HUATUO_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|assistant|>\\n' if message['role'] == 'assistant' else '<|user|>\\n' -}}
{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}
{{- item['text'] if message['role'] == 'assistant' else item['text'] | trim -}}
{%- endfor -%}
{{- ' \\n' if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""


@dataclass(frozen=True)
class OriginalFamily:
    """A family of checkpoints in an original layout."""

    name: str
    model_type: str  # in the original config.json
    text_type: str  # transformers' model type of the language model
    chat_template: str
    always_pads: bool  # pictures are padded to a square whatever the config's image_aspect_ratio is
    adds_bos: bool  # its tokenizer puts the beginning-of-text token in front of a conversation
    pads_with: str  # the tokenizer's attribute with the token that pads batches, as in the original


FAMILIES = {
    family.name: family
    for family in (
        OriginalFamily("llava-med", "llava_mistral", "mistral", MISTRAL_TEMPLATE, False, True, "unk_token"),
        OriginalFamily("huatuogpt-vision", "llava_qwen2", "qwen2", HUATUO_TEMPLATE, True, False, "eos_token"),
    )
}


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


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to copy: where it is, and its new name. Sizes are those of the source."""

    file: Path
    key: str
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class VisionTower:
    """Config and image processing of a vision tower, and the folder that they come from."""

    config: CLIPVisionConfig
    image_processor: dict[str, Any]
    folder: Path | None


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
    original = _read_json(source / "config.json")
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
        vision_tower_sha256=None if has_tower or tower.folder is None else hash_files(*_list_weights(tower.folder)),
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
        build_processor(original, family, tower, tokenizer).save_pretrained(partial)
        write_json(partial / CONVERSION_RECORD, record.model_dump())
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return record


# --- the original's config


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
            raise UnsupportedCheckpoint(f"{where}: {name} is {json.dumps(original.get(name))}, expected {kind.__name__}")
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


# --- the vision tower


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
        content = _read_json(folder / "config.json")
        content = content.get("vision_config") or content  # a whole CLIP model, or its vision part
        if content.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise UnsupportedCheckpoint(
                f"{folder / 'config.json'}: model_type is {content.get('model_type')!r}; only CLIP towers are converted"
            )
        config = CLIPVisionConfig.from_dict(content)
    processing: dict[str, Any] = {"size": {"shortest_edge": config.image_size}}
    processing["crop_size"] = {"height": config.image_size, "width": config.image_size}
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        described = _read_json(folder / "preprocessor_config.json")
        wanted = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
        wanted += ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        processing |= {key: described[key] for key in wanted if key in described}
    return VisionTower(config, processing, folder)


def plan_tower_weights(source: Path, original: Mapping[str, Any], tower: VisionTower) -> list[PlannedTensor]:
    """The tower's weights from its own folder, for an original that does not contain them."""
    if tower.folder is None:
        raise UnsupportedCheckpoint(
            f"{source}: contains no weights of the vision tower (model.vision_tower.*), which the original loads from "
            f"{original['mm_vision_tower']!r}; name a folder with that model with --vision-tower"
        )
    planned = []
    for one in _read_headers(tower.folder):
        if IGNORED.fullmatch(one.key) or one.key.startswith(("text_model.", "text_projection.", "visual_projection.")):
            continue
        if one.key != "logit_scale":  # of a whole CLIP model, like the prefixes above
            planned.append(replace(one, name=TOWER + one.key.removeprefix("vision_model.")))
    return planned


# --- tokenizer and processor


def read_tokenizer(source: Path, family: OriginalFamily) -> Any:
    """The original's tokenizer with the image token and a padding token.

    Raises UnsupportedCheckpoint if it would not produce the original's tokens: no beginning-of-text token where the
    original has one, or another reading of the text after a picture. The original tokenizes the parts before and after
    a picture by themselves (tokenizer_image_token in mm_utils.py).
    """
    tokenizer = _load_tokenizer(source, family)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = getattr(tokenizer, family.pads_with) or tokenizer.eos_token
    before, after = PROBES
    first, second = tokenizer(before)["input_ids"], tokenizer(after)["input_ids"]
    if family.adds_bos:
        if tokenizer.bos_token_id is None or first[:1] != [tokenizer.bos_token_id]:
            raise UnsupportedCheckpoint(f"{source}: its tokenizer does not put {tokenizer.bos_token} in front of a text")
        second = second[1:]
    expected = [*first, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), *second]
    if tokenizer(before + IMAGE_TOKEN + after)["input_ids"] != expected:
        raise UnsupportedCheckpoint(
            f"{source}: its tokenizer reads the text after {IMAGE_TOKEN} differently from a text by itself, which is "
            "how the original reads it; its tokenizer.json must put a space in front of every part (prepend_scheme "
            '"always", or a Prepend normalizer)'
        )
    return tokenizer


def _load_tokenizer(source: Path, family: OriginalFamily) -> Any:
    """From tokenizer.json or vocabulary and merges; from tokenizer.model only where there is nothing else.

    Without tokenizer.json, AutoTokenizer of transformers 5.19.0 reads Mistral's tokenizer.model as a TokenizersBackend
    that leaves out SentencePiece's space in front of a text; LlamaTokenizer with legacy=True keeps it.
    """
    path = source / "tokenizer.model"
    if (source / "tokenizer.json").is_file() or not path.is_file():
        try:
            config = CONFIG_MAPPING[family.text_type]()
            return AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UnsupportedCheckpoint(f"{source}: its tokenizer cannot be loaded: {error}") from error
    try:
        pieces = import_module("sentencepiece").SentencePieceProcessor(model_file=str(path))
        tokenizer = LlamaTokenizer.from_pretrained(source, legacy=True)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        raise UnsupportedCheckpoint(
            f"{path}: reading it without a tokenizer.json needs SentencePiece: pip install 'sentencepiece==0.2.0' "
            f"protobuf ({error})"
        ) from error
    for text in PROBES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != pieces.encode(text):
            raise UnsupportedCheckpoint(f"{path}: transformers reads {text!r} differently from SentencePiece")
    return tokenizer


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
    listed = _read_json(path).get("eos_token_id") if path.is_file() else None
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    ids = sorted(ends)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ids if len(ids) > 1 else ids[0],
        pad_token_id=tokenizer.pad_token_id,
    )


# --- weights


def plan_original_weights(source: Path) -> tuple[list[PlannedTensor], tuple[str, ...]]:
    """(weights under their new names, names that are left out). Raises UnsupportedCheckpoint for an unknown name."""
    planned, ignored, unknown = [], [], []
    for one in _read_headers(source):
        name = rename_weight(one.key)
        if IGNORED.fullmatch(one.key):
            ignored.append(one.key)
        elif name is None:
            unknown.append(one.key)
        else:
            planned.append(replace(one, name=name))
    if unknown:
        raise UnsupportedCheckpoint(f"{source}: {_list_some(unknown)}: not a weight of the original layout")
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
        raise UnsupportedCheckpoint(f"{source}: lacks {_list_some(missing)} (names after conversion)")
    if unexpected := [one.key for one in planned if one.name not in expected]:
        raise UnsupportedCheckpoint(f"{source}: {_list_some(unexpected)}: the config describes no such weight")
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
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        tensors = {one.name: _read_tensor(one, vocabulary) for one in group}
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(groups) > 1:
        total = sum(_count_bytes(one) for one in planned)
        write_json(out / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def group_by_size(planned: Sequence[PlannedTensor], most: int) -> list[list[PlannedTensor]]:
    """Consecutive groups of at most `most` bytes; a larger tensor is a group by itself."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for one in planned:
        if groups[-1] and size + _count_bytes(one) > most:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += _count_bytes(one)
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


# --- files


def _read_headers(folder: Path) -> list[PlannedTensor]:
    """Every tensor of a folder's safetensors under its own name, file by file."""
    found = []
    for path in _list_weights(folder):
        try:
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118: the object is no mapping
                    header = weights.get_slice(key)
                    found.append(PlannedTensor(path, key, key, tuple(header.get_shape()), header.get_dtype()))
        except SafetensorError as error:
            raise UnsupportedCheckpoint(f"{path}: not a whole safetensors file: {error}") from None
    return found


def _list_weights(folder: Path) -> list[Path]:
    """The weight files: those that the index names, or all *.safetensors. A pickle is never read."""
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        paths = sorted({folder / name for name in _read_json(index).get("weight_map", {}).values()})
        if missing := [path.name for path in paths if not path.is_file()]:
            raise UnsupportedCheckpoint(f"{folder}: {WEIGHTS_INDEX} lists {_list_some(missing)}, not in the folder")
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if paths:
        return paths
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickled:
        raise UnsupportedCheckpoint(
            f"{folder}: {_list_some(pickled)} is pickled, and loading a pickle runs code from it; save the model as "
            "safetensors first (save_pretrained of transformers does)"
        )
    raise UnsupportedCheckpoint(f"{folder}: no *.safetensors in this folder")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedCheckpoint(f"{path}: no such file") from None
    except ValueError as error:
        raise UnsupportedCheckpoint(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UnsupportedCheckpoint(f"{path}: expected a JSON object")
    return content


_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


def _count_bytes(planned: PlannedTensor) -> int:
    return math.prod(planned.shape) * _DTYPE_BYTES.get(planned.dtype, 1)


def _list_some(names: Iterable[str], most: int = 5) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
