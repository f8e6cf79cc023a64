"""`clincot convert`: checkpoints in a layout that transformers does not load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from clincot.cli.framework import Commands, Entry, add_command, build_group
from clincot.cli.model_commands import MODEL_PANEL


def add_convert_commands(commands: Commands) -> None:
    """Add `convert` and a command for each original layout."""
    about, convert = "Convert a checkpoint from its original layout to Hugging Face's Llava class.", Commands()
    add_command(convert, "llava-med", convert_llava_med, ConvertArguments)
    add_command(convert, "huatuogpt-vision", convert_huatuogpt_vision, ConvertArguments)
    commands["convert"] = Entry(MODEL_PANEL, about, lambda: build_group(convert, about))


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """What is converted, and where it goes."""

    source: Annotated[Path, typer.Argument(help="Folder of the original checkpoint (config.json, *.safetensors).")]
    out: Annotated[Path, typer.Argument(help="Folder that is written; it must not exist.")]
    vision_tower: Annotated[
        Path | None,
        typer.Option(
            "--vision-tower",
            metavar="DIR",
            help="Folder of the CLIP model that the original names as mm_vision_tower, as safetensors. Needed if the "
            "original does not contain its weights.",
        ),
    ] = None


def convert_llava_med(args: ConvertArguments) -> int:
    """Convert LLaVA-Med 1.5 (model_type llava_mistral), such as microsoft/llava-med-v1.5-mistral-7b."""
    return _convert(args, "llava-med")


def convert_huatuogpt_vision(args: ConvertArguments) -> int:
    """Convert HuatuoGPT-Vision 7B (model_type llava_qwen2), such as FreedomIntelligence/HuatuoGPT-Vision-7B."""
    return _convert(args, "huatuogpt-vision")


def _convert(args: ConvertArguments, family: str) -> int:
    from clincot.models.conversion.convert import convert_checkpoint
    from clincot.models.conversion.original_families import FAMILIES

    record = convert_checkpoint(args.source, args.out, FAMILIES[family], vision_tower=args.vision_tower)
    added = record.vocabulary - record.source_vocabulary
    print(
        f"{args.out}: LlavaForConditionalGeneration from {record.model_type} {record.source_sha256[:12]}; "
        f"<image> is token {record.image_token_id}, {added} rows added to the vocabulary"
    )
    return 0
