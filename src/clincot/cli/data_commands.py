"""The commands that make data sets and score reports: ingest, render, report-questions, report-metrics."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clincot.errors import InvalidInput

if TYPE_CHECKING:
    from clincot.datasets.ingest.ingest_report import IngestReport

Command = Callable[..., argparse.ArgumentParser]


def add_data(commands: Any, command: Command) -> None:
    """Add the commands to the parser's; `command` makes one."""
    _add_ingest(commands, command)
    _add_render(commands, command)
    _add_reports(commands, command)


def _add_render(commands: Any, command: Command) -> None:
    render = command(commands, "render", "radiographs with questions, rendered from the benchmark's CT", _run_render)
    render.add_argument("--out", type=Path, required=True)
    render.add_argument("--warps", type=_range, required=True, metavar="FROM:TO", help="patients (warps of the CT)")
    render.add_argument("--images", type=int, required=True)
    render.add_argument("--questions", type=int, default=3, help="at most so many an image (default 3)")
    render.add_argument("--seed", type=int, default=0)
    render.add_argument("--split", default="")
    render.add_argument(
        "--composition",
        choices=["any", "without", "only"],
        default="any",
        help="combinations of finding and place: all, all but those held out, those alone",
    )


# What `ingest` reads: {format: (what SOURCE is, splits, the first of which is the default)}
_FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vqa-rad": (
        "the release's folder; its official split leaks 202 of 203 test images into train",
        ("image-disjoint", "official"),
    ),
    "slake": ("the release's folder, with train.json and imgs/", ("official", "image-disjoint")),
    "iu-xray": ("R2Gen's folder, with annotation.json and images/", ("official", "patient-disjoint")),
    "dicom": ("a folder of DICOM files, at any depth", ("given", "patient-disjoint")),
    "jsonl": ("a file with one question a line, images beside it", ("given", "by-row", "patient-disjoint")),
}

_ONE_FOLDER = ", all in one folder"


def _add_ingest(commands: Any, command: Command) -> None:
    ingest = command(commands, "ingest", "a data set in its published layout to a data-set folder", _run_ingest)
    formats = ingest.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, (about, splits) in _FORMATS.items():
        one = formats.add_parser(name, help=about)
        one.add_argument("source", type=Path, metavar="SOURCE", help=about)
        one.add_argument("--out", type=Path, required=True)
        one.add_argument(
            "--split",
            choices=splits,
            default=splits[0],
            help=f"(default: {splits[0]}{_ONE_FOLDER if splits[0] == 'given' else ''})",
        )
        one.add_argument("--test-share", type=float, default=0.2, help="of a disjoint split (default 0.2)")
        one.add_argument("--seed", type=int, default=0, help="of a disjoint split (default 0)")
        one.add_argument("--workers", type=int, metavar="N", help="processes that read images (default: all cores)")
        one.add_argument(
            "--allow-refused",
            type=int,
            default=0,
            metavar="N",
            help="exit 0 with up to N bad rows; the good ones are kept in any case",
        )
        if name == "slake":
            one.add_argument("--language", choices=["en", "zh"], default="en")
            one.add_argument(
                "--box-format",
                choices=["xywh", "xyxy"],
                default="xywh",
                help="what the four numbers of detection.json are; the masks have to agree",
            )
        if name == "iu-xray":
            one.add_argument("--placeholders", choices=["keep", "drop"], default="keep", help='the word "XXXX"')
        if name == "dicom":
            one.add_argument(
                "--questions",
                type=Path,
                metavar="JSONL",
                help="questions whose `image` is a path in SOURCE; without it images only",
            )
            one.add_argument(
                "--salt-file",
                type=Path,
                default=Path("~/.config/clincot/patient-salt").expanduser(),
                help="the patient keys' secret; made at the first use (default: %(default)s)",
            )


def _run_ingest(args: argparse.Namespace) -> int:
    common = ("command", "run_command", "format", "source", "out")
    options: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in common}
    return _tell(args.command, lambda: _ingest_of(args.format)(args.source, args.out, **options))


def _tell(command: str, ingest: Callable[[], IngestReport]) -> int:
    """Print the report; 1 where more rows were refused than allowed (the good ones are in place all the same)."""
    from clincot.datasets.ingest.ingest_report import TooManyRefused

    try:
        report = ingest()
    except TooManyRefused as error:
        print(error.report.format_summary())
        print(f"clincot {command}: {error.verdict}", file=sys.stderr)
        return 1
    print(report.format_summary())
    return 0


def _ingest_of(name: str) -> Callable[..., IngestReport]:
    if name == "dicom":
        from clincot.datasets.dicom import ingest_dicom

        return ingest_dicom
    if name == "slake":
        from clincot.datasets.slake import ingest_slake

        return ingest_slake
    if name == "iu-xray":
        from clincot.datasets.iu_xray import ingest_iu_xray

        return ingest_iu_xray
    if name == "vqa-rad":
        from clincot.datasets.vqa_rad import ingest_vqa_rad

        return ingest_vqa_rad
    from clincot.datasets.jsonl_vqa import ingest_jsonl

    return ingest_jsonl


def _run_render(args: argparse.Namespace) -> int:
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


def _add_reports(commands: Any, command: Command) -> None:
    questions = command(
        commands,
        "report-questions",
        "a data set that asks for reports, from one with reports.jsonl",
        _run_report_questions,
    )
    questions.add_argument("source", type=Path, help="data set with reports.jsonl: {study, text} a line")
    questions.add_argument("--out", type=Path, required=True)
    questions.add_argument("--question", default="Describe the findings.", help="what is asked (default: %(default)s)")
    questions.add_argument("--workers", type=int, metavar="N", help="processes that read images (default: all cores)")
    questions.add_argument(
        "--allow-refused",
        type=int,
        default=0,
        metavar="N",
        help="exit 0 with up to N bad rows; the good ones are kept in any case",
    )
    metrics = command(commands, "report-metrics", "score generated reports against references", _run_report_metrics)
    metrics.add_argument("--references", type=Path, required=True, help="reports.jsonl: {study, text} a line")
    metrics.add_argument(
        "--hypotheses",
        type=Path,
        required=True,
        help="the generated reports, likewise; a row may say from how many `views`",
    )
    metrics.add_argument("--train", type=Path, help="training reports: the vocabulary of the r2gen protocol")
    metrics.add_argument("--studies", type=Path, help="studies.jsonl: intervals are then clustered by patient")
    metrics.add_argument(
        "--clinical",
        action="append",
        default=[],
        choices=["radgraph", "chexbert", "ratescore"],
        help="also this metric; fails where its package or weights are missing",
    )
    metrics.add_argument("--label", default="", help="what the table is called")
    metrics.add_argument("--out", type=Path, help="also write everything as JSON")
    metrics.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (default 2000)")
    metrics.add_argument("--seed", type=int, default=0)


def _run_report_questions(args: argparse.Namespace) -> int:
    from clincot.datasets.report_questions import make_report_questions

    return _tell(
        args.command,
        lambda: make_report_questions(
            args.source, args.out, question=args.question, allow_refused=args.allow_refused, workers=args.workers
        ),
    )


def _run_report_metrics(args: argparse.Namespace) -> int:
    """Everything that can be computed is printed and written; a clinical metric that cannot ends it with 1."""
    from clincot.evaluation.report_text.score_files import score_reports, write_scores

    scores = score_reports(
        args.references,
        args.hypotheses,
        training=args.train,
        studies=args.studies,
        clinical=args.clinical,
        label=args.label,
        seed=args.seed,
        resamples=args.resamples,
    )
    print(scores.render_table())
    if args.out is not None:
        write_scores(args.out, scores)
        print(f"\n{args.out}")
    if missing := [name for name in args.clinical if name in scores.absent]:
        raise InvalidInput("not computed: " + "; ".join(scores.absent[name] for name in missing))
    return 0


def _range(text: str) -> range:
    first, colon, last = text.partition(":")
    if not colon or not first.isdigit() or not last.isdigit() or int(first) >= int(last):
        raise argparse.ArgumentTypeError(f"expected FROM:TO with FROM < TO, for instance 0:24, got {text!r}")
    return range(int(first), int(last))
