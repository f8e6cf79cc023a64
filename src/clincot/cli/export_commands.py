"""`clincot export`: data sets and preference pairs in the formats of other trainers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from clincot.cli.data_commands import DATA_PANEL
from clincot.cli.framework import Commands, Entry, add_command, build_group
from clincot.config import resolve_path
from clincot.errors import InvalidInput

LicenceOption = Annotated[
    str, typer.Option("--licence", metavar="ID", help="Licence for the card, as the Hub spells it (cc-by-4.0).")
]
ExportOutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder that is written; it must be empty.")
]


def add_export_commands(commands: Commands) -> None:
    """Add `export` and a command for each format."""
    about, export = "Write a data set or preference pairs in the format of another trainer.", Commands()
    add_command(export, "parquet", export_parquet, ExportDataArguments)
    add_command(export, "llava", export_llava, ExportLlavaArguments)
    add_command(export, "pairs", export_pairs, ExportPairsArguments)
    add_command(export, "dicom", export_dicom, ExportDicomArguments)
    commands["export"] = Entry(DATA_PANEL, about, lambda: build_group(export, about))


@dataclass(frozen=True, kw_only=True)
class ExportLlavaArguments:
    """Which data set is written, and where to."""

    source: Annotated[Path, typer.Argument(help="Data-set folder, as written by ingest.")]
    out: ExportOutOption


@dataclass(frozen=True, kw_only=True)
class ExportDataArguments(ExportLlavaArguments):
    """Which data set is written, and what its card says."""

    split: Annotated[str, typer.Option("--split", metavar="NAME", help="Name of the split on the Hub.")] = "train"
    licence: LicenceOption = ""


@dataclass(frozen=True, kw_only=True)
class ExportPairsArguments:
    """Which pairs are written."""

    source: Annotated[Path, typer.Argument(help="Folder of a round, with its pairs.jsonl, such as runs/demo/round-01.")]
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Data-set folder of the round.")]
    policy: Annotated[
        Path,
        typer.Option("--policy", metavar="DIR", help="Checkpoint that wrote the candidates, for its prompts."),
    ]
    out: ExportOutOption
    steps: Annotated[
        Path | None,
        typer.Option("--steps", metavar="JSON", help="JSON list of the questions of a chain (answer.steps)."),
    ] = None
    licence: LicenceOption = ""


@dataclass(frozen=True, kw_only=True)
class ExportDicomArguments:
    """Which regions are written, and the files that they belong to."""

    source: Annotated[
        Path, typer.Argument(help="Folder of a round, with its regions.jsonl, such as runs/demo/round-01.")
    ]
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Data-set folder of the round.")]
    originals: Annotated[
        Path,
        typer.Option("--originals", metavar="DIR", help="DICOM files, or the DICOMDIR, that the data set came from."),
    ]
    out: ExportOutOption
    salt_file: Annotated[
        Path,
        typer.Option("--salt-file", metavar="PATH", help="File with the secret that the data set was ingested with."),
    ] = Path("~/.config/clincot/patient-salt")
    kind: Annotated[
        Literal["sr", "seg", "both"],
        typer.Option("--kind", help="Objects: structured reports, segmentations, or both."),
    ] = "both"


def export_parquet(args: ExportDataArguments) -> int:
    """Write a data set as a Parquet table with its images inside, for Hugging Face datasets."""
    from clincot.reporting import data_export

    count = data_export.export_dataset(args.source, args.out, split=args.split, licence=args.licence)
    print(json.dumps({"rows": count}))
    return 0


def export_llava(args: ExportLlavaArguments) -> int:
    """Write a data set as conversations in LLaVA's JSON, with its images."""
    from clincot.reporting import data_export

    print(json.dumps({"conversations": data_export.export_llava(args.source, args.out)}))
    return 0


def export_pairs(args: ExportPairsArguments) -> int:
    """Write the preference pairs of a round as prompt, chosen and rejected, for TRL."""
    from clincot.generation.requests import read_steps
    from clincot.prompts import load_prompt_format
    from clincot.reporting import data_export
    from clincot.training.rows import PairFiles

    names = ("pairs", "candidates", "regions", "questions")
    files = PairFiles(**{name: args.source / f"{name}.jsonl" for name in names})
    steps = read_steps({} if args.steps is None else {"steps": args.steps})
    views = load_prompt_format(resolve_path(args.policy))
    counts = data_export.export_pairs(files, args.data, args.out, views, steps=steps, licence=args.licence)
    print(json.dumps({"answers": counts.answers, "regions": counts.regions}))
    return 0


def export_dicom(args: ExportDicomArguments) -> int:
    """Write the regions of a round as DICOM SR and SEG objects, which name the patient as the originals do."""
    from clincot.datasets.dicom import read_salt
    from clincot.reporting import dicom_export

    salt_file = args.salt_file.expanduser()
    if not salt_file.is_file():
        raise InvalidInput(f"{salt_file}: expected the secret that the data set was ingested with, but it is missing")
    kinds: tuple[dicom_export.ObjectKind, ...] = ("sr", "seg") if args.kind == "both" else (args.kind,)
    salt = read_salt(salt_file, args.out)
    counts = dicom_export.export_dicom(args.source, args.data, args.originals, args.out, salt=salt, kinds=kinds)
    print(json.dumps(asdict(counts)))
    return 0
