"""`clincot review`: preference pairs for people to judge, and their verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clincot.cli.data_commands import DATA_PANEL
from clincot.cli.framework import Commands, Entry, add_command, build_group
from clincot.errors import InvalidInput

if TYPE_CHECKING:
    from clincot.judging.people_verdicts import ReviewReport
    from clincot.judging.review_queue import ReviewItem

TASKS_FILE, CONFIG_FILE, KEY_FILE = "tasks.json", "labeling_config.xml", "key.json"
REVIEW_REPORT_FILE, CALIBRATION_FILE = "review.report.json", "calibration.jsonl"


def add_review_commands(commands: Commands) -> None:
    """Add `review` and its commands."""
    about, review = "Let people judge preference pairs in Label Studio, blinded.", Commands()
    add_command(review, "export", export_review, ReviewExportArguments)
    add_command(review, "import", import_review, ReviewImportArguments)
    commands["review"] = Entry(DATA_PANEL, about, lambda: build_group(review, about))


@dataclass(frozen=True, kw_only=True)
class ReviewedRoundArguments:
    """Which round."""

    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of a run.")]
    round: Annotated[
        int | None, typer.Option("--round", metavar="N", help="Number of the round (default: the last with pairs).")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReviewExportArguments(ReviewedRoundArguments):
    """How much is reviewed, and where the tasks go."""

    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the tasks, their config and the key.")]
    budget: Annotated[int, typer.Option("--budget", min=1, help="Number of pairs that people have time for.")] = 200
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random order of tasks and answers.")] = 0
    image_url: Annotated[
        str,
        typer.Option(
            "--image-url",
            metavar="PREFIX",
            help="Address below which the data set's images are served; without it the tasks contain the pictures.",
        ),
    ] = ""


@dataclass(frozen=True, kw_only=True)
class ReviewImportArguments(ReviewedRoundArguments):
    """What came back, and where the results go."""

    annotations: Annotated[Path, typer.Argument(help="Label Studio's export in the format JSON.")]
    review: Annotated[Path, typer.Option("--review", metavar="DIR", help="Folder that `clincot review export` wrote.")]
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for judgements, pairs and the report.")]
    calibrate: Annotated[
        Literal["", "platt", "isotonic"],
        typer.Option("--calibrate", help="Also fit each judge's calibration on the verdicts, by this method."),
    ] = ""


def export_review(args: ReviewExportArguments) -> int:
    """Write a queue of pairs for Label Studio: uncertain, contested and high-gap pairs first, and random ones."""
    from clincot.jsonl import atomic_write, read_records, write_json
    from clincot.judging.label_studio import LABELING_CONFIG
    from clincot.judging.review_queue import select_review_items
    from clincot.records import PanelScore, PreferencePair

    folder = _find_round(args)
    scores = {one.candidate: one.score for one in read_records(folder / "scores.jsonl", PanelScore)}
    items = select_review_items(
        list(read_records(folder / "pairs.jsonl", PreferencePair)),
        {candidate: score for candidate, score in scores.items() if score is not None},
        budget=args.budget,
        seed=args.seed,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / TASKS_FILE, _build_tasks(args, folder, items))
    write_json(args.out / KEY_FILE, [item.model_dump(mode="json") for item in items])
    with atomic_write(args.out / CONFIG_FILE) as file:
        file.write(LABELING_CONFIG)
    print(
        f"{args.out}: {len(items)} tasks\n"
        f"In Label Studio, create a project with the labeling interface of {CONFIG_FILE} and import {TASKS_FILE}. "
        f"Keep {KEY_FILE} from the readers; `clincot review import` needs it."
    )
    return 0


def _build_tasks(args: ReviewExportArguments, folder: Path, items: list[ReviewItem]) -> list[object]:
    from clincot.judging.label_studio import build_task, encode_picture
    from clincot.records import Candidate, Question, Region, Study
    from clincot.runs.layout import read_run, resolve_run_path
    from clincot.runs.lookup import grep_records

    data = resolve_run_path(args.run, read_run(args.run).data)
    asked = {item.question for item in items}
    questions = {one.id: one for one in grep_records(folder / "questions.jsonl", Question, asked)}
    shown = {question.study for question in questions.values()}
    studies = {one.id: one for one in grep_records(data / "studies.jsonl", Study, shown)}
    wanted = {item.answer_a for item in items} | {item.answer_b for item in items}
    found = grep_records(folder / "candidates.jsonl", Candidate, wanted)
    candidates = {one.id: one for one in found if one.id in wanted}  # not the later steps that continue them
    seen = {candidate.region for candidate in candidates.values()}
    regions = {one.id: one for one in grep_records(folder / "regions.jsonl", Region, seen)}
    tasks = []
    for item in items:
        study = studies[questions[item.question].study]
        picture = f"{args.image_url.rstrip('/')}/{study.image}" if args.image_url else encode_picture(study, data)
        pair = (item.answer_a, item.answer_b)
        answers = {one: candidates[one].text for one in pair}
        boxes = {one: regions[candidates[one].region].box for one in pair}
        tasks.append(build_task(item, questions[item.question].text, picture, answers, boxes))
    return tasks


def import_review(args: ReviewImportArguments) -> int:
    """Bring verdicts back: people's judgements, agreement with the panel, and the pairs without those they veto."""
    from clincot.jsonl import read_json, read_records, write_json, write_records
    from clincot.judging.label_studio import read_annotations
    from clincot.judging.people_verdicts import PeopleJudge
    from clincot.judging.review_queue import ReviewItem
    from clincot.records import Judgement, PanelScore, PreferencePair
    from clincot.runs.layout import read_judge_names

    folder = _find_round(args)
    items = [ReviewItem.model_validate(item) for item in read_json(args.review / KEY_FILE)]
    config = (args.review / CONFIG_FILE).read_text(encoding="utf-8")
    people = PeopleJudge(items, read_annotations(args.annotations), config)
    pairs = list(read_records(folder / "pairs.jsonl", PreferencePair))
    unknown = {item.pair for item in items} - {pair.id for pair in pairs}
    if unknown:
        raise InvalidInput(f"{args.review}: {len(unknown)} reviewed pairs are not in {folder}; choose their round")
    names = read_judge_names(folder)
    raw: dict[str, dict[str, float]] = {digest: {} for digest in names}
    for judgement in read_records(folder / "judgements.jsonl", Judgement):
        if judgement.score is not None and judgement.judge in raw:
            raw[judgement.judge][judgement.candidate] = judgement.score
    scores = {one.candidate: one.score for one in read_records(folder / "scores.jsonl", PanelScore)}
    panel = {candidate: score for candidate, score in scores.items() if score is not None}
    reviewed = people.review_pairs(pairs)
    report = people.compare(panel, {names[digest]: one for digest, one in raw.items()}, reviewed)
    vetoed = {pair.pair for pair in reviewed if pair.veto}
    calibrations = people.fit_calibrations(raw, args.calibrate) if args.calibrate else []

    args.out.mkdir(parents=True, exist_ok=True)
    write_records(args.out / "judgements.jsonl", people.build_judgements())
    write_records(args.out / "pairs.jsonl", (pair for pair in pairs if pair.id not in vetoed))
    write_records(args.out / "vetoed.jsonl", (pair for pair in pairs if pair.id in vetoed))
    write_json(args.out / REVIEW_REPORT_FILE, report.model_dump(mode="json"))
    if calibrations:
        write_records(args.out / CALIBRATION_FILE, calibrations)
    print(render_review(report))
    return 0


def render_review(report: ReviewReport) -> str:
    """The report as text."""
    from clincot.text import markdown_table

    head = ("judge", "alpha with people", "both right", "both wrong", "only judge right", "only people right")
    rows = []
    for judge in report.judges:
        alpha, counts = judge.alpha.value, judge.confusion
        cells = (counts.both_right, counts.both_wrong, counts.only_judge_right, counts.only_people_right)
        rows.append((judge.name, "-" if alpha is None else f"{alpha:.2f}", *map(str, cells)))
    orders = [(one.reason, str(one.same), str(one.opposite), str(one.no_difference)) for one in report.orders]
    among = "undefined" if report.readers_alpha.value is None else f"{report.readers_alpha.value:.2f}"
    vetoes = "; ".join(f"{count} {reason}" for reason, count in report.vetoes.items()) or "none"
    return "\n\n".join(
        (
            f"{report.reviewed} of {report.tasks} tasks reviewed by {report.readers} readers; Krippendorff's alpha of "
            f"the readers: {among}",
            markdown_table(head, rows),
            "Preferences; only the pairs chosen at random are a fair sample of the round:",
            markdown_table(("chosen as", "same order", "opposite order", "no difference"), orders),
            f"Vetoed pairs: {vetoes}",
        )
    )


def _find_round(args: ReviewedRoundArguments) -> Path:
    """The folder of the round. Raises InvalidInput if it has no pairs."""
    from clincot.runs.layout import list_round_folders, parse_round_number

    folders = {parse_round_number(path): path for path in list_round_folders(args.run)}
    with_pairs = [number for number, path in folders.items() if (path / "pairs.jsonl").is_file()]
    number = args.round if args.round is not None else max(with_pairs, default=0)
    if number not in with_pairs:
        raise InvalidInput(f"{args.run}: expected a round with pairs, got {args.round or 'none'}; it has {with_pairs}")
    return folders[number]
