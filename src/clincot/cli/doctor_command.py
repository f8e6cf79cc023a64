"""`clincot doctor`: whether a checkpoint can work here, and what to do if it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from clincot.cli.framework import Commands, add_command
from clincot.cli.model_commands import MODEL_PANEL
from clincot.cli.options import ParamsArguments, read_params
from clincot.config import resolve_path


def add_doctor_command(commands: Commands) -> None:
    """Add `doctor`."""
    add_command(commands, "doctor", examine, DoctorArguments, panel=MODEL_PANEL)


@dataclass(frozen=True, kw_only=True)
class DoctorArguments(ParamsArguments):
    """Which checkpoint is examined, and for what."""

    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or shipped:NAME.")]
    role: Annotated[
        Literal["policy", "judge", "text-judge"],
        typer.Option(
            "--as",
            help="What the checkpoint is to be: a policy, a judge, which has to read yes and no, or a text-judge, "
            "which is a language model without image input (text_only).",
        ),
    ] = "policy"
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory",
            min=0.0,
            metavar="GIB",
            help="Memory of the GPU in GiB, which the estimates have to fit into (default: the GPU of this machine, "
            "if it has one).",
        ),
    ] = None
    no_generate: Annotated[
        bool, typer.Option("--no-generate", help="Do not load the weights, and generate no tokens.")
    ] = False


def examine(args: DoctorArguments) -> int:
    """Check a checkpoint from its config class to two tokens that it writes, and say what to do if it cannot work.

    Checked are its files, config class, processor, chat template, image tokens, yes and no, end tokens, the form of its
    regions, vocabulary, the GPU memory for serving and for training with the recipe, and the names and shapes of its
    tensors. A text-judge is checked for what reads text. The exit code is 1 if a check fails.
    """
    from transformers.utils import logging

    from clincot.preflight.doctor import DoctorOptions, examine_checkpoint, find_gpu_memory
    from clincot.preflight.preflight_report import render_check_table

    logging.set_verbosity_error()  # its warnings would stand between the lines of the table
    params = read_params(args)
    options = DoctorOptions(
        role=args.role,
        train=params.train,
        propose=params.propose,
        gpu_gib=find_gpu_memory() if args.gpu_memory is None else args.gpu_memory,
        generate=not args.no_generate,
    )
    path = resolve_path(args.checkpoint)
    checks = list(examine_checkpoint(path, options))
    print(render_check_table(checks))
    failed = [check.name for check in checks if check.state == "fail"]
    if failed:
        print(
            f"{path} cannot be used as {args.role}: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}"
        )
        return 1
    print(f"{path} can be used as {args.role}.")
    return 0
