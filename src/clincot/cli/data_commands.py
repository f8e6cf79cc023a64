"""The commands that make data sets and score reports: ingest, render, report-questions, report-metrics."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clincot.cli.framework import Commands, Entry, add_command, build_group
from clincot.cli.round_commands import ROUND_PANEL
from clincot.errors import InvalidInput

if TYPE_CHECKING:
    from clincot.datasets.ingest.ingest_report import IngestReport

DATA_PANEL = "Data"
WorkersOption = Annotated[
    int | None, typer.Option("--workers", metavar="N", help="Processes that read images (default: one for each core).")
]
AllowRefusedOption = Annotated[
    int,
    typer.Option(
        "--allow-refused", metavar="N", help="Exit with 0 if at most N rows are bad; good rows are always kept."
    ),
]
FurtherImagesOption = Annotated[
    Literal["keep", "drop", "join"],
    typer.Option(
        "--further-images",
        help="Second and later images of a question: keep them apart, which rounds refuse; drop them; or join all side"
        " by side in one picture.",
    ),
]
DataOutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Data-set folder that is written.")]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the random choices.")]


class ClinicalMetricName(StrEnum):
    """Report metrics whose readers are neural; an enumeration, since typer takes no list of literals."""

    RADGRAPH = "radgraph"
    CHEXBERT = "chexbert"
    RATESCORE = "ratescore"


def add_data_commands(commands: Commands) -> None:
    """Add the commands that make data sets, and the one that scores reports."""
    about, ingest = "Convert a data set from its published layout into a data-set folder.", Commands()
    for name, (function, arguments) in INGEST_FORMATS.items():
        add_command(ingest, name, function, arguments)
    commands["ingest"] = Entry(DATA_PANEL, about, lambda: build_group(ingest, about))
    add_command(commands, "render", render_dataset, RenderArguments, panel=DATA_PANEL)
    add_command(commands, "report-questions", make_questions, ReportQuestionsArguments, panel=DATA_PANEL)
    add_command(commands, "report-metrics", score_reports, ReportMetricsArguments, panel=ROUND_PANEL)


@dataclass(frozen=True, kw_only=True)
class IngestArguments:
    """What every format of `ingest` takes."""

    out: DataOutOption
    test_share: Annotated[
        float, typer.Option("--test-share", metavar="SHARE", help="Share of the test set in a disjoint split.")
    ] = 0.2
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of a disjoint split.")] = 0
    workers: WorkersOption = None
    allow_refused: AllowRefusedOption = 0


@dataclass(frozen=True, kw_only=True)
class VqaRadArguments(IngestArguments):
    """VQA-RAD."""

    source: Annotated[Path, typer.Argument(help="Folder of the VQA-RAD release.")]
    split: Annotated[
        Literal["image-disjoint", "official"],
        typer.Option("--split", help="The official split leaks 202 of 203 test images into the training set."),
    ] = "image-disjoint"


@dataclass(frozen=True, kw_only=True)
class SlakeArguments(IngestArguments):
    """SLAKE."""

    source: Annotated[Path, typer.Argument(help="Folder of the SLAKE release, with train.json and imgs/ in it.")]
    split: Annotated[
        Literal["official", "image-disjoint"], typer.Option("--split", help="How train and test are separated.")
    ] = "official"
    language: Annotated[Literal["en", "zh"], typer.Option("--language", help="Language of the questions to keep.")] = (
        "en"
    )
    box_format: Annotated[
        Literal["xywh", "xyxy"],
        typer.Option(
            "--box-format", help="Meaning of the four numbers in detection.json; it is checked against the masks."
        ),
    ] = "xywh"


@dataclass(frozen=True, kw_only=True)
class IuXrayArguments(IngestArguments):
    """IU X-Ray."""

    source: Annotated[Path, typer.Argument(help="R2Gen's folder of IU X-Ray, with annotation.json and images/ in it.")]
    split: Annotated[
        Literal["official", "patient-disjoint"], typer.Option("--split", help="How train and test are separated.")
    ] = "official"
    placeholders: Annotated[
        Literal["keep", "drop"],
        typer.Option("--placeholders", help='Whether to keep the anonymisation placeholder "XXXX" in the reports.'),
    ] = "keep"


GivenSplitHelp = "How train and test are separated; given: not at all, everything goes into one folder."


def parse_frames(text: str) -> int | Literal["all"]:
    """A frame's number from 1, or "all". Raises BadParameter, which is wrong usage."""
    if text == "all":
        return "all"
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"expected a number from 1, or all, got {text!r}")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class DicomSettings(IngestArguments):
    """What DICOM files take, wherever they come from."""

    split: Annotated[Literal["given", "patient-disjoint"], typer.Option("--split", help=GivenSplitHelp)] = "given"
    frames: Annotated[
        Any,
        typer.Option(
            "--frames",
            metavar="N|all",
            parser=parse_frames,
            help="Frame that is taken of files with several, or all of them; a question names one as PATH#N.",
        ),
    ] = None
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            metavar="JSONL",
            help="File of questions whose `image` is a path in SOURCE; without it, only the images are ingested.",
        ),
    ] = None
    salt_file: Annotated[
        Path,
        typer.Option(
            "--salt-file",
            metavar="PATH",
            help="File with the secret from which patient keys are derived; created on first use.",
        ),
    ] = Path("~/.config/clincot/patient-salt")
    burned_in: Annotated[
        Literal["off", "warn", "refuse"],
        typer.Option(
            "--burned-in",
            help="Search pixels for text: not at all; report it (warn, if the extra ocr is installed); or refuse such"
            " files and those whose header states burned-in annotations.",
        ),
    ] = "warn"


@dataclass(frozen=True, kw_only=True)
class DicomArguments(DicomSettings):
    """DICOM files."""

    source: Annotated[Path, typer.Argument(help="Folder of DICOM files, at any depth, or a DICOMDIR.")]


@dataclass(frozen=True, kw_only=True)
class DicomWebArguments(DicomSettings):
    """Which images of an archive, and how it is reached."""

    url: Annotated[
        str, typer.Argument(help="Root of the DICOMweb service, such as https://pacs.example/dicom-web, without a key.")
    ]
    study: Annotated[list[str], typer.Option("--study", metavar="UID", help="Take this study; may be repeated.")] = (
        field(default_factory=list)
    )
    series: Annotated[list[str], typer.Option("--series", metavar="UID", help="Take this series; may be repeated.")] = (
        field(default_factory=list)
    )
    query: Annotated[
        list[str],
        typer.Option(
            "--query",
            metavar="ATTRIBUTE=VALUE",
            help="Take the studies that match, such as StudyDate=20240101-20241231; may be repeated, all must match.",
        ),
    ] = field(default_factory=list)
    modality: Annotated[
        list[str],
        typer.Option("--modality", metavar="CODE", help="Take only series of this modality, such as CR; repeatable."),
    ] = field(default_factory=list)
    token_env: Annotated[
        str, typer.Option("--token-env", metavar="NAME", help="Environment variable with a bearer token.")
    ] = ""
    basic_env: Annotated[
        str, typer.Option("--basic-env", metavar="NAME", help="Environment variable with USER:PASSWORD.")
    ] = ""
    ca_file: Annotated[
        Path | None,
        typer.Option("--ca-file", metavar="PEM", help="Certificates of the authority that the archive's is signed by."),
    ] = None
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Longest wait for the archive to send something.")
    ] = 60.0
    page_size: Annotated[
        int, typer.Option("--page-size", metavar="N", min=1, help="Results that a page of a search asks for.")
    ] = 200
    connections: Annotated[
        int, typer.Option("--connections", metavar="N", min=1, help="Instances that are retrieved at a time.")
    ] = 4
    max_instances: Annotated[
        int, typer.Option("--max-instances", metavar="N", min=1, help="Refuse a selection with more instances.")
    ] = 10_000
    max_gib: Annotated[
        float, typer.Option("--max-gib", metavar="SIZE", help="Stop when this many GiB have been retrieved.")
    ] = 100.0
    files: Annotated[
        Path | None,
        typer.Option(
            "--files",
            metavar="DIR",
            help="Keep the retrieved files, which contain patients' identities, in this folder (default: they are"
            " removed when the data set is complete).",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class JsonlArguments(IngestArguments):
    """Questions in JSON lines."""

    source: Annotated[
        Path, typer.Argument(help="File with one question on each line (JSONL), in the same folder as its images.")
    ]
    split: Annotated[Literal["given", "by-row", "patient-disjoint"], typer.Option("--split", help=GivenSplitHelp)] = (
        "given"
    )
    further_images: FurtherImagesOption = "keep"


@dataclass(frozen=True, kw_only=True)
class HubArguments(IngestArguments):
    """Tables as they are published."""

    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of a Hugging Face data set, or a file: Parquet, Arrow, JSON, JSON lines, CSV, TSV or ZIP."
        ),
    ]
    column: Annotated[
        list[str],
        typer.Option(
            "--column",
            metavar="FIELD=COLUMN",
            help="Read a field from this column instead of the guessed one; may be repeated. The report shows guesses.",
        ),
    ] = field(default_factory=list)
    where: Annotated[
        list[str],
        typer.Option("--where", metavar="COLUMN=VALUE", help="Keep only rows with this value; may be repeated."),
    ] = field(default_factory=list)
    modality: Annotated[
        str, typer.Option("--modality", metavar="TEXT", help="What the images are, if no column states it.")
    ] = ""
    split: Annotated[
        Literal["given", "by-row", "patient-disjoint"] | None,
        typer.Option("--split", help="How train and test are separated (default: as the source does, if it does)."),
    ] = None
    further_images: FurtherImagesOption = "keep"


@dataclass(frozen=True, kw_only=True)
class BoxesArguments(IngestArguments):
    """Boxes of findings."""

    source: Annotated[
        Path, typer.Argument(help="Folder of VinDr-CXR or MS-CXR as released, or one of their tables (CSV).")
    ]
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", metavar="DIR", help="Folder of the images, such as MIMIC-CXR-JPG's (default: in SOURCE)."
        ),
    ] = None
    absent: Annotated[
        int, typer.Option("--absent", metavar="N", help="Questions about absent findings for each image of VinDr-CXR.")
    ] = 1
    split: Annotated[Literal["given", "by-row", "patient-disjoint"], typer.Option("--split", help=GivenSplitHelp)] = (
        "given"
    )


def ingest_vqa_rad(args: VqaRadArguments) -> int:
    """Ingest VQA-RAD from the folder of its release."""
    from clincot.datasets import vqa_rad

    return _run_ingest(vqa_rad.ingest_vqa_rad, args)


def ingest_slake(args: SlakeArguments) -> int:
    """Ingest SLAKE from the folder of its release."""
    from clincot.datasets import slake

    return _run_ingest(slake.ingest_slake, args)


def ingest_iu_xray(args: IuXrayArguments) -> int:
    """Ingest the reports of IU X-Ray in R2Gen's layout."""
    from clincot.datasets import iu_xray

    return _run_ingest(iu_xray.ingest_iu_xray, args)


def ingest_dicom(args: DicomArguments) -> int:
    """Ingest DICOM files, with pseudonyms in place of patient ids."""
    from clincot.datasets import dicom

    return _run_ingest(dicom.ingest_dicom, replace(args, salt_file=args.salt_file.expanduser()))


def ingest_dicomweb(args: DicomWebArguments) -> int:
    """Ingest images from an archive over DICOMweb, with pseudonyms in place of patient ids."""
    from clincot.clients.dicomweb import DicomWebAccess, read_auth_header
    from clincot.datasets.dicom import DicomPlan
    from clincot.datasets.dicomweb_ingest import ArchiveSelection, ingest_dicomweb

    access = DicomWebAccess(
        args.url,
        auth_header=read_auth_header(token_env=args.token_env, basic_env=args.basic_env),
        ca_file=args.ca_file,
        timeout_s=args.timeout,
        page_size=args.page_size,
        connections=args.connections,
    )
    query = [item.partition("=") for item in args.query]
    selection = ArchiveSelection(
        studies=args.study,
        series=args.series,
        query=[(name, value) for name, _, value in query],
        modalities=args.modality,
        max_instances=args.max_instances,
        max_bytes=int(args.max_gib * 2**30),
    )
    settings = {one.name: getattr(args, one.name) for one in fields(DicomPlan)}
    plan = DicomPlan(**settings | {"salt_file": args.salt_file.expanduser()})
    return _print_report("ingest", lambda: ingest_dicomweb(access, args.out, selection, plan, files=args.files))


def ingest_jsonl(args: JsonlArguments) -> int:
    """Ingest questions from a file of JSON lines."""
    from clincot.datasets import jsonl_vqa

    return _run_ingest(jsonl_vqa.ingest_jsonl, args)


def ingest_hf(args: HubArguments) -> int:
    """Ingest a table as it is published: a Hugging Face folder, Parquet, Arrow, JSON, CSV, LLaVA or ZIP."""
    from clincot.datasets import hub_vqa

    return _run_ingest(hub_vqa.ingest_hf, args)


def ingest_boxes(args: BoxesArguments) -> int:
    """Ingest the boxes of VinDr-CXR or MS-CXR as questions whether a finding is there."""
    from clincot.datasets import finding_boxes

    return _run_ingest(finding_boxes.ingest_boxes, args)


# {format: (function, its arguments)}
INGEST_FORMATS: dict[str, tuple[Callable[[Any], int], type[Any]]] = {
    "vqa-rad": (ingest_vqa_rad, VqaRadArguments),
    "slake": (ingest_slake, SlakeArguments),
    "iu-xray": (ingest_iu_xray, IuXrayArguments),
    "dicom": (ingest_dicom, DicomArguments),
    "dicomweb": (ingest_dicomweb, DicomWebArguments),
    "jsonl": (ingest_jsonl, JsonlArguments),
    "hf": (ingest_hf, HubArguments),
    "boxes": (ingest_boxes, BoxesArguments),
}


def _run_ingest(ingest: Callable[..., IngestReport], args: Any) -> int:
    options = {one.name: getattr(args, one.name) for one in fields(args) if one.name not in ("source", "out")}
    return _print_report("ingest", lambda: ingest(args.source, args.out, **options))


def _print_report(command: str, ingest: Callable[[], IngestReport]) -> int:
    """Print the report; return 1 if more rows were refused than allowed (the good ones are written all the same)."""
    from clincot.datasets.ingest.ingest_report import TooManyRefused

    try:
        report = ingest()
    except TooManyRefused as error:
        print(error.report.format_summary())
        print(f"clincot {command}: {error.verdict}", file=sys.stderr)
        return 1
    print(report.format_summary())
    return 0


def parse_range(text: str) -> range:
    """FROM:TO as a range. Raises BadParameter, which is wrong usage."""
    first, colon, last = text.partition(":")
    if not colon or not first.isdigit() or not last.isdigit() or int(first) >= int(last):
        raise typer.BadParameter(f"expected FROM:TO with FROM < TO, for instance 0:24, got {text!r}")
    return range(int(first), int(last))


@dataclass(frozen=True, kw_only=True)
class RenderArguments:
    """How many images of which patients."""

    out: DataOutOption
    warps: Annotated[
        range,
        typer.Option(
            "--warps",
            metavar="FROM:TO",
            parser=parse_range,
            help="Range of patients (warps of the CT), for instance 0:24 for 24 patients.",
        ),
    ]
    images: Annotated[int, typer.Option("--images", metavar="N", help="Number of images to render.")]
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", help="Maximum number of questions per image.")
    ] = 3
    seed: SeedOption = 0
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="Name of the split in the records (default: name of --out).")
    ] = ""
    composition: Annotated[
        Literal["any", "without", "only"],
        typer.Option(
            "--composition",
            help="Which combinations of finding and location occur: any; all without the held-out ones; only those.",
        ),
    ] = "any"


def render_dataset(args: RenderArguments) -> int:
    """Render radiographs with questions from a public CT, as a controlled benchmark."""
    from clincot.synthetic.build import build_synthetic_dataset
    from clincot.synthetic.scenes import Composition

    counts = build_synthetic_dataset(
        args.out,
        warp_seeds=args.warps,
        images=args.images,
        questions_per_image=args.questions,
        seed=args.seed,
        split=args.split or args.out.name,
        composition=Composition(args.composition),
    )
    print(json.dumps(counts))
    return 0


@dataclass(frozen=True, kw_only=True)
class ReportQuestionsArguments:
    """Which reports are asked for."""

    source: Annotated[Path, typer.Argument(help="Data-set folder with a reports.jsonl of {study, text} rows.")]
    out: DataOutOption
    question: Annotated[
        str, typer.Option("--question", metavar="TEXT", help="The question that every study is asked.")
    ] = "Describe the findings."
    views: Annotated[
        Literal["all", "first"],
        typer.Option(
            "--views", help="Images of a report that are shown: all of them side by side in one picture, or the first."
        ),
    ] = "all"
    workers: WorkersOption = None
    allow_refused: AllowRefusedOption = 0


def make_questions(args: ReportQuestionsArguments) -> int:
    """Make a data set that asks for a report of every study, from one that has reports."""
    from clincot.datasets.report_questions import make_report_questions

    return _print_report(
        "report-questions",
        lambda: make_report_questions(
            args.source,
            args.out,
            question=args.question,
            views=args.views,
            allow_refused=args.allow_refused,
            workers=args.workers,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ReportMetricsArguments:
    """Which reports are scored, and how."""

    references: Annotated[
        Path,
        typer.Option("--references", metavar="JSONL", help="Reference reports (reports.jsonl): {study, text} rows."),
    ]
    hypotheses: Annotated[
        Path,
        typer.Option(
            "--hypotheses",
            metavar="JSONL",
            help="Generated reports in the same format; a row may add `views`, the number of its images.",
        ),
    ]
    train: Annotated[
        Path | None,
        typer.Option("--train", metavar="JSONL", help="Training reports: the vocabulary of the R2Gen protocol."),
    ] = None
    studies: Annotated[
        Path | None,
        typer.Option(
            "--studies", metavar="JSONL", help="A studies.jsonl; with it, intervals are clustered by patient."
        ),
    ] = None
    clinical: Annotated[
        list[ClinicalMetricName],
        typer.Option(
            "--clinical",
            help="Also compute this clinical metric; may be repeated. It fails if its package or weights are missing.",
        ),
    ] = field(default_factory=list)
    label: Annotated[str, typer.Option("--label", metavar="TEXT", help="Title of the table.")] = ""
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write all scores to this file (JSON).")
    ] = None
    resamples: Annotated[
        int, typer.Option("--resamples", metavar="N", help="Bootstrap resamples for the confidence intervals.")
    ] = 2000
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the bootstrap.")] = 0


def score_reports(args: ReportMetricsArguments) -> int:
    """Score generated reports against reference reports.

    Print and write every metric that can be computed; exit with 1 if a clinical metric cannot.
    """
    from clincot.evaluation.report_text import score_files

    clinical = [metric.value for metric in args.clinical]
    scores = score_files.score_reports(
        args.references,
        args.hypotheses,
        training=args.train,
        studies=args.studies,
        clinical=clinical,
        label=args.label,
        seed=args.seed,
        resamples=args.resamples,
    )
    print(scores.render_table())
    if args.out is not None:
        score_files.write_scores(args.out, scores)
        print(f"\n{args.out}")
    if missing := [name for name in clinical if name in scores.absent]:
        raise InvalidInput("not computed: " + "; ".join(scores.absent[name] for name in missing))
    return 0
