"""The page of a run: one HTML file with everything in it, made from the run's files and nothing else.

No script, no external resource, no absolute path, no time: the same run gives the same bytes. The answer key
stands on the page for benchmark questions only; data/references.jsonl is never opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clincot import __version__, jsonl
from clincot.config import Params, load_params
from clincot.evaluation import blind_baseline
from clincot.evaluation.benchmark_report import METRIC_HEADINGS
from clincot.evaluation.intervals import MIN_RELIABLE_CLUSTERS
from clincot.jsonl import InvalidRecord, read_json, read_json_model
from clincot.promotion.checks import METRIC_NAMES
from clincot.promotion.explain import explain_decision
from clincot.prompts import PromptFormat
from clincot.records import BenchmarkReport, Checkpoint, Decision, Interval, Outcome
from clincot.reporting import figures, gallery
from clincot.runs import layout
from clincot.runs.layout import RunFile, RunResults

RENDERED_DISCLAIMER = (
    "Every radiograph on this page is rendered from one real chest CT, warped and edited, so that where the answer can "
    "be seen is known exactly. It is a controlled experiment on one anatomy: it tests whether a model looks where the "
    "answer is. It is not clinical evidence, and these models are not clinical models."
)
SHORT_DISCLAIMER = "One anatomy, controlled; not clinical evidence."
DATA_DISCLAIMER = (
    "This page shows how a model learnt where to look, and how well it answers. It is a technical experiment, "
    "not clinical evidence, and these models are not clinical models."
)
_EXAMPLE_COUNT = 6
_DISCORDANT_COUNT = 4  # a round
_GAIN_METRICS = {"gain": "correct", "hit_gain": "hit"}  # column -> metric of results.json's paired differences
_REQUIRED_METRICS = {"gain": "accuracy", "hit_gain": "hit_rate"}
_PAIRED_METRICS = {"accuracy": "correct", "hit_rate": "hit"}


@dataclass(frozen=True)
class KeyFigure:
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class TableColumn:
    name: str
    heading: str
    drawn: bool = False
    signed: bool = False


@dataclass(frozen=True)
class TableRow:
    arm: str
    main: bool
    cells: dict[str, Interval | None]  # by column
    whiskers: dict[str, figures.Whisker | None]


@dataclass(frozen=True)
class TableGroup:
    """The rows of one policy."""

    name: str
    note: str
    rows: tuple[TableRow, ...]


MAIN_COLUMNS = (
    TableColumn("accuracy", METRIC_HEADINGS["accuracy"], drawn=True),
    TableColumn("gain", "vs base", signed=True),
    TableColumn("hit_rate", METRIC_HEADINGS["hit_rate"], drawn=True),
    TableColumn("hit_gain", "vs base", signed=True),
    TableColumn("iou", METRIC_HEADINGS["iou"]),
    TableColumn("off_format", METRIC_HEADINGS["off_format"]),
)


@dataclass(frozen=True)
class RoundSummary:
    number: int
    decision: Decision | None
    made: str
    discordant: tuple[gallery.BenchmarkExample, ...] = ()  # some of the questions that only one of the two got right
    won: int = 0  # by the challenger
    lost: int = 0
    explained: str = ""  # what would have to change


def write_page(run_dir: Path, out: Path, *, title: str) -> None:
    """Write the page of a run to `out`, aside and then renamed.

    Raises BadRecord where a file of the run is missing or is not what it should be, BadImage where a picture is.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["score"] = lambda value: f"{value:.2f}"
    environment.filters["metric"] = lambda value: f"{value:.3f}"
    environment.filters["signed"] = lambda value: f"{value:+.3f}".replace("-", "−")
    text = environment.get_template("page.html").render(_build_context(run_dir, title))
    with jsonl.atomic_write(out) as file:
        file.write(text)


def _build_context(run: Path, title: str) -> dict[str, Any]:
    """Everything the template shows."""
    about, results = layout.read_run(run), layout.read_results(run)
    params = load_params(run / layout.PARAMS_FILE)
    main_arm = params.decide.arm
    folders = layout.list_round_folders(run)
    names = [name for name in METRIC_HEADINGS if any(name in arm for row in results.rows for arm in row.arms.values())]
    blind_accuracy = results.blind.arms.get(blind_baseline.BLIND_ARM, {}).get("accuracy")
    line = figures.build_whisker(blind_accuracy)

    pictures = gallery.PageImages()
    data, benchmark = (layout.resolve_run_path(run, path) for path in (about.data, about.benchmark))
    benchmarked = gallery.select_benchmark_examples(
        _find_policies(run, folders, about), benchmark, main_arm, pictures, _EXAMPLE_COUNT
    )
    rounds = _find_gallery_rounds(run, folders)
    asked = gallery.select_question_examples(rounds, data, pictures, _EXAMPLE_COUNT)
    pairs = gallery.select_pair_examples(rounds, data, pictures, _EXAMPLE_COUNT)
    decisions = [_summarise_round(run, folder, about, benchmark, main_arm, pictures) for folder in folders]
    rendered = all(study.modality == "rendered radiograph" for _, study in pictures.films.values())
    logs = {_format_round_name(folder): log for folder in folders if (log := _read_training_log(folder / "policy"))}
    return {
        "title": title,
        "version": __version__,
        "statement": RENDERED_DISCLAIMER if rendered else DATA_DISCLAIMER,
        "statement_short": SHORT_DISCLAIMER if rendered else "Not clinical evidence.",
        "facts": _build_key_figures(folders, results, main_arm),
        "main_arm": main_arm,
        "results": _build_groups(results, names, main_arm, params.evaluate.arms),
        "columns": [column for column in MAIN_COLUMNS if _REQUIRED_METRICS.get(column.name, column.name) in names],
        "more_columns": [TableColumn(name, METRIC_HEADINGS[name]) for name in names],
        "blind": None if line is None else line.value,
        "notes": _build_notes(results),
        "rounds": decisions,
        "check_names": METRIC_NAMES,
        "benchmarked": benchmarked,
        "asked": asked,
        "grounders": sorted({answer.grounder for one in asked for answer in one.answers}),
        "pairs": pairs,
        "logs": logs,
        "charts": figures.build_charts(logs),
        "chart": figures.PLOT_FRAME,
        "films": _list_films(pictures),
        "provenance": _build_provenance(run, about, folders),
        "files": [
            ("Configuration: params.yaml", (run / layout.PARAMS_FILE).read_text(encoding="utf-8")),
            ("Digests of its sections", "\n".join(f"{n:9} {getattr(params, n).digest}" for n in Params.model_fields)),
        ],
    }


def _find_gallery_rounds(run: Path, folders: Sequence[Path]) -> list[gallery.GalleryRound]:
    """The rounds that made pairs, each with its judges and the views of the policy that answered in it."""
    places = layout.find_run_policies(run)
    made = []
    for folder in folders:
        if (folder / "pairs.jsonl").is_file():
            place = places.get(gallery.read_round_policy(folder))
            views = PromptFormat() if place is None else gallery.find_prompt_format(place)
            judges = layout.read_judge_names(folder)
            made.append(gallery.GalleryRound(layout.parse_round_number(folder), folder, views, judges))
    return made


def _find_policies(run: Path, folders: Sequence[Path], about: RunFile) -> list[tuple[str, Path, PromptFormat]]:
    """The base policy and every round's, with what they answered to the benchmark."""
    found = [("base", run / "base", layout.resolve_run_path(run, about.policy))]
    found += [(_format_round_name(folder), folder, folder / "policy") for folder in folders]
    return [
        (name, folder / "outcomes.jsonl", gallery.find_prompt_format(checkpoint))
        for name, folder, checkpoint in found
        if (folder / "outcomes.jsonl").is_file()
    ]


def _build_groups(results: RunResults, names: Sequence[str], main_arm: str, order: Sequence[str]) -> list[TableGroup]:
    """Rows of one policy under its name, arms in the order in which they were asked for, the blind baseline last."""
    place = {arm: number for number, arm in enumerate(order)}

    def row(of: str, arm: str, metrics: Mapping[str, Interval]) -> TableRow:
        gains = {name: results.find_gain(of, arm, metric) for name, metric in _GAIN_METRICS.items()}
        drawn = {name: figures.build_whisker(metrics.get(name)) for name in ("accuracy", "hit_rate")}
        return TableRow(arm, arm == main_arm, {**{name: metrics.get(name) for name in names}, **gains}, drawn)

    listed = [*((row.row, row.arms) for row in results.rows), ("blind baseline", results.blind.arms)]
    return [
        TableGroup(
            name,
            _format_question_count(arms),
            tuple(row(name, arm, arms[arm]) for arm in sorted(arms, key=lambda a: place.get(a, 99))),
        )
        for name, arms in listed
    ]


def _format_question_count(arms: Mapping[str, Mapping[str, Interval]]) -> str:
    accuracies = [metrics["accuracy"] for metrics in arms.values() if "accuracy" in metrics]
    return f"{accuracies[0].n + accuracies[0].n_unscored:,} questions" if accuracies else ""


def _build_notes(results: RunResults) -> list[str]:
    accuracies = [arm["accuracy"] for row in results.rows for arm in row.arms.values() if "accuracy" in arm]
    clusters = {accuracy.clusters for accuracy in accuracies if accuracy.n}
    notes = ["“vs base” is the paired difference to the base policy looking at the same kind of region."]
    if clusters and min(clusters) < MIN_RELIABLE_CLUSTERS:
        notes.append(
            f"Intervals from fewer than {MIN_RELIABLE_CLUSTERS} patients are approximate; here there are {min(clusters)}."
        )
    knows = results.blind.fitted_on
    return [*notes, f"The blind baseline knows the answers of {knows}, by question, and never sees an image."]


def _build_key_figures(folders: Sequence[Path], results: RunResults, main_arm: str) -> list[KeyFigure]:
    facts = []
    by_name = {row.row: row.arms.get(main_arm, {}) for row in results.rows}
    last = next((name for folder in reversed(folders) if (name := _format_round_name(folder)) in by_name), "")
    for metric, heading in (("accuracy", "Accuracy"), ("hit_rate", "Region hit-rate")):
        before, after = (by_name.get(name, {}).get(metric) for name in ("base", last))
        if before is not None and after is not None and before.value is not None and after.value is not None:
            gain = results.find_gain(last, main_arm, _PAIRED_METRICS[metric])
            paired = "" if gain is None or gain.value is None else f"paired difference {_format_signed(gain)}"
            facts.append(KeyFigure(f"{heading}, base → {last}", f"{before.value:.3f} → {after.value:.3f}", paired))
    knows_nothing = results.blind.arms.get(blind_baseline.BLIND_ARM, {}).get("accuracy")
    if knows_nothing is not None and knows_nothing.value is not None:
        facts.append(
            KeyFigure(
                "Accuracy without the image",
                f"{knows_nothing.value:.3f}",
                f"the blind baseline, fitted on {results.blind.fitted_on}",
            )
        )
    made = [
        (_read_report(folder, layout.PANEL_REPORT_FILE), _read_report(folder, layout.PAIRS_REPORT_FILE))
        for folder in folders
    ]
    candidates = sum(int(panel.get("candidates", 0)) for panel, _ in made)
    pairs = sum(int(report.get("pairs", 0)) for _, report in made)
    return [
        *facts,
        KeyFigure("Preference pairs", f"{pairs:,}", f"in {len(folders)} rounds, of {candidates:,} candidates"),
    ]


def _format_signed(interval: Interval) -> str:
    limits = "" if interval.low is None or interval.high is None else f" [{interval.low:+.3f}, {interval.high:+.3f}]"
    return f"{interval.value:+.3f}{limits}".replace("-", "−")


def _format_round_name(folder: Path) -> str:
    return f"round {layout.parse_round_number(folder)}"


def _summarise_round(
    run: Path, folder: Path, about: RunFile, benchmark: Path, arm: str, pictures: gallery.PageImages
) -> RoundSummary:
    number, path = layout.parse_round_number(folder), folder / layout.DECISION_FILE
    made = _describe_round_data(
        _read_report(folder, layout.PANEL_REPORT_FILE), _read_report(folder, layout.PAIRS_REPORT_FILE)
    )
    if not path.is_file():
        return RoundSummary(number, None, made)
    decision = read_json_model(path, Decision)
    explained = "" if decision.verdict == "promote" else explain_decision(decision)
    evidence = folder / layout.EVIDENCE_FILE
    if not evidence.is_file() or evidence.stat().st_size == 0:  # nothing could be compared
        return RoundSummary(number, decision, made, explained=explained)
    by_digest = {
        next(outcome.policy for outcome in jsonl.read_records(outcomes, Outcome)): (outcomes, views)
        for _, outcomes, views in _find_policies(run, layout.list_round_folders(run), about)
    }
    named = {"champion": decision.champion, "challenger": decision.challenger}
    sides = [(name, *by_digest[digest]) for name, digest in named.items() if digest in by_digest]
    if len(sides) < len(named):  # the champion is of another run: its outcomes, and so its regions, are not here
        return RoundSummary(number, decision, made, explained=explained)
    shown, won, lost = gallery.select_discordant_examples(evidence, sides, benchmark, arm, pictures, _DISCORDANT_COUNT)
    return RoundSummary(number, decision, made, tuple(shown), won, lost, explained)


def _describe_round_data(panel: Mapping[str, Any], pairs: Mapping[str, Any]) -> str:
    """A round's preference data in a sentence or two, from the panel's and the pairs' reports."""
    parts = []
    if panel:
        alpha = panel.get("alpha_calibrated", {}).get("value")
        agreement = "undefined" if alpha is None else f"{alpha:.2f}"
        parts.append(
            f"{panel['scored']:,} of {panel['candidates']:,} candidates scored; "
            f"Krippendorff’s α of the judges {agreement}."
        )
        parts += [f"Judge {j['name']} was left out: {j['left_out']}." for j in panel["judges"] if j.get("left_out")]
    if pairs:
        auc = pairs.get("longer_rejected_auc")
        parts.append(
            f"{pairs['pairs']:,} pairs of {pairs['considered']:,} combinations"
            + ("." if auc is None else f"; AUC of “longer = rejected” {auc:.2f}.")
        )
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in pairs["dropped"].items())
        parts += [f"Dropped: {dropped}."] if dropped else []
    return " ".join(parts)


def _read_report(folder: Path, name: str) -> dict[str, Any]:
    """A stage's report; empty where the round has not come so far."""
    path = folder / name
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise InvalidRecord(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_training_log(checkpoint: Path) -> list[dict[str, Any]]:
    path = checkpoint / layout.TRAIN_LOG_FILE
    if not path.is_file():
        return []
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise InvalidRecord(f"{path}: expected a list of objects, one a logged step")
    return content


def _list_films(pictures: gallery.PageImages) -> list[tuple[str, str, float, float]]:
    """(element id, data URI, width, height in drawing units)."""
    made = []
    for name, (uri, study) in pictures.films.items():
        scale = figures.FILM_UNITS / max(study.width, study.height)
        made.append((name, uri, round(study.width * scale, 1), round(study.height * scale, 1)))
    return made


def _build_provenance(run: Path, about: RunFile, folders: Sequence[Path]) -> list[tuple[str, str, str]]:
    """(what, digest, note). Names of folders, not their paths: the page is the same wherever the run lies."""
    base = read_json_model(run / "base" / layout.BENCHMARK_REPORT_FILE, BenchmarkReport)
    rows = [("base policy", base.policy, Path(about.policy).name)]
    for folder, checkpoint in layout.iter_checkpoints(run):
        rows.append((str(folder.relative_to(run)), checkpoint.sha256, _describe_checkpoint(checkpoint)))
    judges = {digest: name for folder in folders for digest, name in layout.read_judge_names(folder).items()}
    places = {judge.name: Path(judge.path).name or "endpoint" for judge in about.judges}
    rows += [(name, digest, f"judge, {places.get(name, 'not in run.json')}") for digest, name in judges.items()]
    return [*rows, ("benchmark", base.benchmark, Path(about.benchmark).name)]


def _describe_checkpoint(checkpoint: Checkpoint) -> str:
    known = (("parent", checkpoint.parent), ("pairs", checkpoint.pairs), ("train section", checkpoint.config))
    parts = [f"{name} {value[:12]}" for name, value in known if value]
    return ", ".join([checkpoint.id, *parts, *([f"git {checkpoint.git}"] if checkpoint.git else [])])
