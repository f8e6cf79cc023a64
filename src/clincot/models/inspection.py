"""Reads config and processor of a checkpoint, and refuses what cannot work: the problem and what to do about it.

Weights are not read here. `vlm.load_checkpoint` and `clincot doctor` share these checks, so that a checkpoint which the
doctor refuses is refused in the same words wherever it is loaded.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from clincot.models.checkpoint import UnsupportedCheckpoint, check_no_adapter
from clincot.models.quiet_loading import quiet_transformers

PREFIX_FAMILIES = frozenset({"paligemma"})  # no chat template: ConversationEncoder lays the prompt out
TESTED_FAMILIES = "Llava, LlavaNext, LlavaOnevision, Qwen2/2.5/3-VL, InternVL, Gemma3, PaliGemma, Idefics3 and SmolVLM"
_CONVERSIONS = {  # model_type of an original layout: (what it is, what makes it loadable)
    "llava_mistral": ("the original layout of LLaVA-Med 1.5", "llava-med"),
    "llava_qwen2": ("the original layout of HuatuoGPT-Vision", "huatuogpt-vision"),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def read_model_config(path: str) -> Any:
    """The checkpoint's config, of a class that transformers loads as an image-text-to-text model.

    Raises UnsupportedCheckpoint for an unknown model_type, the layout of an original repository, an adapter, and models
    of text or images only.
    """
    check_no_adapter(Path(path))
    content = _read_json(Path(path) / "config.json")
    kind = str(content.get("model_type", ""))
    if kind in _CONVERSIONS:
        layout, name = _CONVERSIONS[kind]
        raise UnsupportedCheckpoint(
            f"{path}: config.json has model_type {kind!r}, {layout}, which transformers does not know",
            f"convert it to Hugging Face's Llava class: clincot convert {name} {shlex.quote(path)} OUT",
        )
    if "mm_vision_tower" in content:  # of haotian-liu/LLaVA, llava/model/llava_arch.py (v1.2.2)
        raise UnsupportedCheckpoint(
            f"{path}: config.json has the layout of the original LLaVA repository (mm_vision_tower)",
            "use the model's Hugging Face version, whose name mostly ends in -hf",
        )
    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        is_known = type(config) in AutoModelForImageTextToText._model_mapping
    except (RuntimeError, ImportError) as error:  # a torchvision that does not fit breaks imports of transformers
        cause = _find_torchvision_error(error)
        if cause is None:
            raise
        raise refuse_without_torchvision(path, cause) from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _refuse_config(path, kind, content, error) from error
    if not is_known:
        raise UnsupportedCheckpoint(
            f"{path}: {type(config).__name__} (model_type {config.model_type!r}) is no model that reads images and "
            "writes text",
            f"use a checkpoint of one of the tested families: {TESTED_FAMILIES}",
        )
    return config


def _find_torchvision_error(error: BaseException) -> Exception | None:
    """The error about torchvision among an error and its causes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Exception) and "torchvision" in str(cause):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; {} if there is no such file or it is not one, which AutoConfig reports."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_config(path: str, kind: str, content: Mapping[str, Any], error: Exception) -> UnsupportedCheckpoint:
    if "auto_map" in content:
        return UnsupportedCheckpoint(
            f"{path}: model_type {kind!r} needs program code of the checkpoint's repository, which is not executed",
            f"use its Hugging Face version (its name mostly ends in -hf), or a tested family: {TESTED_FAMILIES}",
        )
    if kind and "does not recognize this architecture" in str(error):
        return UnsupportedCheckpoint(
            f"{path}: transformers {version('transformers')} does not know model_type {kind!r}",
            f"use a checkpoint of one of the tested families: {TESTED_FAMILIES}",
        )
    return UnsupportedCheckpoint(
        f"{path}: config.json cannot be read as a model's config: {first_line(error)}",
        "copy config.json from the published checkpoint",
    )


def load_processor(path: str) -> Any:
    """The checkpoint's processor.

    A family without a video processor gets the image processor of PIL, so that the pixels do not depend on whether
    torchvision is installed. A family with one (Qwen-VL, InternVL, LLaVA-OneVision, SmolVLM) needs torchvision for it
    and uses torchvision's image processor as well: transformers 5.19 takes one `backend` for both
    (processing_utils.py, ProcessorMixin._get_arguments_from_pretrained) and has no video processor of PIL.
    """
    # here, because it fails where torchvision is installed and does not work with torch
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, AutoProcessor

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    processor_class = PROCESSOR_MAPPING.get(type(config), None)
    if processor_class is not None and "video_processor" in processor_class.get_attributes():
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)
    return AutoProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)


def read_processor(path: str, model_type: str) -> Any:
    """Load and check the processor.

    Raises UnsupportedCheckpoint if a file or torchvision is missing, there is no chat template, or the processor does
    not report which text it makes of a picture (Idefics2, Gemma3n), without which a picture's tokens cannot be found.
    """
    try:
        processor = load_processor(path)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, RuntimeError) as error:
        raise _refuse_processor(path, error) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):  # a bare tokenizer
        raise _refuse_processor(path, None)
    if not processor.tokenizer.is_fast:
        raise UnsupportedCheckpoint(
            f"{path}: its tokenizer has no character offsets, with which the policy's own words are found",
            "add tokenizer.json (AutoTokenizer.from_pretrained(…).save_pretrained writes it)",
        )
    if getattr(processor, "chat_template", None) is None and model_type not in PREFIX_FAMILIES:
        raise UnsupportedCheckpoint(
            f"{path}: the processor has no chat template",
            "add chat_template.jinja from the published checkpoint or from the model that this one was trained from",
        )
    _check_picture_text(processor, path)
    return processor


def _refuse_processor(path: str, error: Exception | None) -> UnsupportedCheckpoint:
    """What is wrong with a processor that did not load: a package, a missing file, or what transformers says.

    Raises a RuntimeError again that is not about torchvision.
    """
    if error is not None and "torchvision" in str(error).lower():
        return refuse_without_torchvision(path, error)
    if isinstance(error, ImportError):
        return UnsupportedCheckpoint(
            f"{path}: its processor needs a package that is not installed here: {first_line(error)}", "install it"
        )
    if isinstance(error, RuntimeError):
        raise error
    folder = Path(path)
    groups = (_PROCESSOR_FILES, _TOKENIZER_FILES) if folder.is_dir() else ()
    missing = [" or ".join(names) for names in groups if not _has_any(folder, names)]
    if missing:
        return UnsupportedCheckpoint(
            f"{path}: the processor is incomplete, there is no {', and no '.join(missing)}",
            "copy the missing files from the published checkpoint, or write them with processor.save_pretrained",
        )
    what = "it has no image processor" if error is None else first_line(error)
    return UnsupportedCheckpoint(
        f"{path}: the processor cannot be loaded: {what}",
        "copy processor_config.json, preprocessor_config.json and the tokenizer's files from the published checkpoint",
    )


def refuse_without_torchvision(path: str, error: Exception) -> UnsupportedCheckpoint:
    """The refusal for an error that is about torchvision: not installed, or not made for the torch installed."""
    problem = "its processor needs torchvision, which is not installed here"
    if find_spec("torchvision") is not None:
        problem = f"torchvision is installed but does not work with torch {version('torch')} ({first_line(error)})"
    return UnsupportedCheckpoint(
        f"{path}: {problem}",
        f"run `{find_torchvision_command()}`, or take a checkpoint of a family that runs without it: "
        "Idefics3, Llava, LlavaNext, Gemma3, PaliGemma",
    )


def find_torchvision_command() -> str:
    """The pip command for the torchvision that fits the torch installed, of the same build (CPU or CUDA version).

    torchvision 0.(N+15) is built against torch 2.N (pytorch/vision README, "torch / torchvision" table: 2.0 and 0.15 up
    to 2.13 and 0.28), and each wheel requires its exact torch, so pip finds the patch release.
    """
    base, _, build = version("torch").partition("+")
    major, minor = base.split(".")[:2]
    wanted = f'"torchvision==0.{int(minor) + 15}.*"' if major == "2" else "torchvision"
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f'pip install "torch=={base}" {wanted}{index}'


def _check_picture_text(processor: Any, path: str) -> None:
    """Raise UnsupportedCheckpoint unless the processor says what replaces a picture's placeholder."""
    try:
        placeholder = getattr(processor, "boi_token", None) or processor.image_token
        out = processor(
            text=[placeholder],
            images=[[Image.new("RGB", (64, 64))]],
            return_tensors="pt",
            return_text_replacement_offsets=True,
        )
        ids = [i for i in processor.image_token_ids if i is not None]
        known = bool(ids) and len(out["text_replacement_offsets"][0]) == 1
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise _refuse_family(processor, path, first_line(error)) from error
    if not known:
        raise _refuse_family(processor, path, "no image token")


def _refuse_family(processor: Any, path: str, reason: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"{path}: {type(processor).__name__} does not report which text it makes of a picture ({reason})",
        f"use a checkpoint of one of the tested families: {TESTED_FAMILIES}",
    )


def read_end_ids(path: str, config: Any) -> list[int]:
    """The ids that end a turn by the generation config, without loading the model."""
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    return list_ids(generation.eos_token_id)


def list_ids(ids: int | list[int] | None) -> list[int]:
    """A config's token ids as a list, which may be absent or a single number."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
