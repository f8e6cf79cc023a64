"""The page of a run: one self-contained HTML file, built from the run's files only.

It has no script, no external resource, no absolute path and no time stamp, so the same run gives the same bytes. It
shows the answer key of benchmark questions only; data/references.jsonl is never opened.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clincot import __version__, jsonl
from clincot.config import SECTION_NAMES, load_params
from clincot.evaluation import blind_baseline
from clincot.evaluation.answer_protocols import choose_headline
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
from clincot.text import format_interval
from clincot.training.term_summary import summarize_terms

RENDERED_DISCLAIMER = (
    "Every radiograph on this page is rendered from one real chest CT, which was warped and edited so that the "
    "location of every answer is known exactly. This is a controlled experiment on one anatomy. It tests whether a "
    "model looks where the answer is; it is not clinical evidence, and these models are not clinical models."
)
SHORT_DISCLAIMER = "One anatomy, controlled; not clinical evidence."
DATA_DISCLAIMER = (
    "This page shows how a model learnt where to look, and how well it answers. It is a technical experiment, "
    "not clinical evidence, and these models are not clinical models."
)
_EXAMPLE_COUNT = 6  # in each section
_DISCORDANT_COUNT = 4  # for each round
# Metric of a report -> metric of results.json's paired differences; others have the same name in both.
_PAIRED_METRICS = {"accuracy": "correct", "hit_rate": "hit"}


@dataclass(frozen=True)
class KeyFigure:
    """A number at the top of the page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class TableColumn:
    """A column of the results table."""

    name: str
    heading: str
    drawn: bool = False  # with a whisker plot
    signed: bool = False


@dataclass(frozen=True)
class TableRow:
    """One arm of a policy in the results table."""

    arm: str
    main: bool  # whether decisions use this arm
    cells: dict[str, Interval | None]  # by column name
    whiskers: dict[str, figures.Whisker | None]  # by column name


@dataclass(frozen=True)
class TableGroup:
    """The rows of one policy in the results table."""

    name: str
    note: str
    rows: tuple[TableRow, ...]


def list_main_columns(headline: str, measured: Collection[str]) -> list[TableColumn]:
    """The columns of the first table that were measured: the headline metric first, exact match as a second figure."""
    columns = []
    if headline in measured:
        columns += [
            TableColumn(headline, METRIC_HEADINGS[headline], drawn=True),
            TableColumn("gain", "vs base", signed=True),
        ]
    if headline != "accuracy" and "accuracy" in measured:
        columns.append(TableColumn("accuracy", METRIC_HEADINGS["accuracy"]))
    if "hit_rate" in measured:
        columns += [
            TableColumn("hit_rate", METRIC_HEADINGS["hit_rate"], drawn=True),
            TableColumn("hit_gain", "vs base", signed=True),
        ]
    return columns + [TableColumn(name, METRIC_HEADINGS[name]) for name in ("iou", "off_format") if name in measured]


@dataclass(frozen=True)
class RoundSummary:
    """A round's decision and preference data."""

    number: int
    decision: Decision | None
    data: str  # the round's preference data in sentences
    discordant: tuple[gallery.BenchmarkExample, ...] = ()  # sample of the questions that only one of the two got right
    won: int = 0  # discordant questions that the challenger got right
    lost: int = 0
    explanation: str = ""  # what would have to change for a promotion


def write_page(run_dir: Path, out: Path, *, title: str, browser: str = "", browser_artifact: str = "") -> None:
    """Write the page of a run to `out`, atomically.

    browser: address of all questions (question_browser.py). browser_artifact: the artifact of a pipeline that has them,
    for a page that is shown without the files beside it.

    Raises InvalidRecord if a file of the run is missing or malformed, InvalidImage if an image is.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["score"] = lambda value: f"{value:.2f}"
    environment.filters["metric"] = lambda value: f"{value:.3f}"
    environment.filters["signed"] = lambda value: f"{value:+.3f}".replace("-", "−")
    text = environment.get_template("page.html").render(
        _build_context(run_dir, title), browser=browser, browser_artifact=browser_artifact
    )
    with jsonl.atomic_write(out) as file:
        file.write(text)


def _build_context(run: Path, title: str) -> dict[str, Any]:
    """Build everything that the template shows."""
    about, results = layout.read_run(run), layout.read_results(run)
    params = load_params(run / layout.PARAMS_FILE)
    main_arm = params.decide.arm
    folders = layout.list_round_folders(run)
    present: set[str] = set()
    for row in results.rows:
        present.update(*row.arms.values())
    names = [name for name in METRIC_HEADINGS if name in present]
    headline = choose_headline(results.protocol, names)
    blind_accuracy = results.blind.arms.get(blind_baseline.BLIND_ARM, {}).get(headline)
    blind_whisker = figures.build_whisker(blind_accuracy)

    pictures = gallery.PageImages()
    data, benchmark = (layout.resolve_run_path(run, path) for path in (about.data, about.benchmark))
    benchmarked = gallery.select_benchmark_examples(
        _find_policies(run, folders, about), benchmark, main_arm, pictures, _EXAMPLE_COUNT
    )
    rounds = _find_gallery_rounds(run, folders)
    questions = gallery.select_question_examples(rounds, data, pictures, _EXAMPLE_COUNT)
    grounders: set[str] = set()
    for example in questions:
        grounders.update(answer.grounder for answer in example.answers)
    pairs = gallery.select_pair_examples(rounds, data, pictures, _EXAMPLE_COUNT)
    decisions = [_summarise_round(run, folder, about, benchmark, main_arm, pictures) for folder in folders]
    rendered = all(study.modality == "rendered radiograph" for _, study in pictures.films.values())
    logs = {_format_round_name(folder): log for folder in folders if (log := _read_training_log(folder / "policy"))}
    return {
        "title": title,
        "version": __version__,
        "statement": RENDERED_DISCLAIMER if rendered else DATA_DISCLAIMER,
        "statement_short": SHORT_DISCLAIMER if rendered else "Not clinical evidence.",
        "facts": _build_key_figures(folders, results, main_arm, headline),
        "headline": headline,
        "main_arm": main_arm,
        "results": _build_groups(results, names, main_arm, params.evaluate.arms, headline),
        "columns": list_main_columns(headline, names),
        "more_columns": [TableColumn(name, METRIC_HEADINGS[name]) for name in names],
        "blind": None if blind_whisker is None else blind_whisker.value,
        "notes": _build_notes(results),
        "rounds": decisions,
        "check_names": METRIC_NAMES,
        "benchmarked": benchmarked,
        "questions": questions,
        "grounders": sorted(grounders),
        "pairs": pairs,
        "logs": logs,
        "terms": [(name, summarize_terms(log)) for name, log in logs.items()],
        "charts": figures.build_charts(logs),
        "chart": figures.PLOT_FRAME,
        "films": _list_films(pictures),
        "provenance": _build_provenance(run, about, folders),
        "files": [
            ("Configuration: params.yaml", (run / layout.PARAMS_FILE).read_text(encoding="utf-8")),
            ("Digests of its sections", "\n".join(f"{n:9} {getattr(params, n).digest}" for n in SECTION_NAMES)),
        ],
    }


def _find_gallery_rounds(run: Path, folders: Sequence[Path]) -> list[gallery.GalleryRound]:
    """Find the rounds with pairs, each with its judges and the prompt format of the policy that answered."""
    policies = layout.find_run_policies(run)
    rounds = []
    for folder in folders:
        if (folder / "pairs.jsonl").is_file():
            checkpoint = policies.get(gallery.read_round_policy(folder))
            views = PromptFormat() if checkpoint is None else gallery.find_prompt_format(checkpoint)
            judges = layout.read_judge_names(folder)
            rounds.append(gallery.GalleryRound(layout.parse_round_number(folder), folder, views, judges))
    return rounds


def _find_policies(run: Path, folders: Sequence[Path], about: RunFile) -> list[tuple[str, Path, PromptFormat]]:
    """Find the base policy and every round's policy, with their outcomes files and prompt formats."""
    policies = [("base", run / "base", layout.resolve_run_path(run, about.policy))]
    policies += [(_format_round_name(folder), folder, folder / "policy") for folder in folders]
    return [
        (name, folder / "outcomes.jsonl", gallery.find_prompt_format(checkpoint))
        for name, folder, checkpoint in policies
        if (folder / "outcomes.jsonl").is_file()
    ]


def _build_groups(
    results: RunResults, names: Sequence[str], main_arm: str, order: Sequence[str], headline: str
) -> list[TableGroup]:
    """Build one group of rows for each policy, arms in the configured order and the blind baseline last."""
    position = {arm: number for number, arm in enumerate(order)}

    def build_row(policy: str, arm: str, metrics: Mapping[str, Interval]) -> TableRow:
        cells = {name: metrics.get(name) for name in names}
        for column, metric in (("gain", headline), ("hit_gain", "hit_rate")):
            cells[column] = results.find_gain(policy, arm, _PAIRED_METRICS.get(metric, metric))
        whiskers = {name: figures.build_whisker(metrics.get(name)) for name in (headline, "hit_rate")}
        return TableRow(arm, arm == main_arm, cells, whiskers)

    groups = []
    for name, arms in [*((row.row, row.arms) for row in results.rows), ("blind baseline", results.blind.arms)]:
        ordered = sorted(arms, key=lambda arm: position.get(arm, 99))
        rows = tuple(build_row(name, arm, arms[arm]) for arm in ordered)
        groups.append(TableGroup(name, _format_question_count(arms), rows))
    return groups


def _format_question_count(arms: Mapping[str, Mapping[str, Interval]]) -> str:
    accuracies = [metrics["accuracy"] for metrics in arms.values() if "accuracy" in metrics]
    return f"{accuracies[0].n + accuracies[0].n_unscored:,} questions" if accuracies else ""


def _build_notes(results: RunResults) -> list[str]:
    clusters: set[int] = set()
    for row in results.rows:
        clusters.update(
            arm["accuracy"].clusters for arm in row.arms.values() if "accuracy" in arm and arm["accuracy"].n
        )
    notes = ["“vs base” is the paired difference to the base policy looking at the same kind of region."]
    if clusters and min(clusters) < MIN_RELIABLE_CLUSTERS:
        notes.append(
            f"Intervals from fewer than {MIN_RELIABLE_CLUSTERS} patients are approximate; this benchmark has "
            f"{min(clusters)}."
        )
    source = results.blind.fitted_on
    return [
        *notes,
        f"The blind baseline gives the most frequent answer of {source} to each question and never sees an image.",
    ]


def _build_key_figures(folders: Sequence[Path], results: RunResults, main_arm: str, headline: str) -> list[KeyFigure]:
    facts = []
    compared = [(headline, "Accuracy"), ("hit_rate", "Region hit-rate")]
    if headline != "accuracy":
        compared = [
            (headline, f"Accuracy by the recipe's protocol ({results.protocol})"),
            ("accuracy", "Accuracy by exact match"),
            ("hit_rate", "Region hit-rate"),
        ]
    by_name = {row.row: row.arms.get(main_arm, {}) for row in results.rows}
    last = next((name for folder in reversed(folders) if (name := _format_round_name(folder)) in by_name), "")
    for metric, heading in compared:
        before, after = (by_name.get(name, {}).get(metric) for name in ("base", last))
        if before is not None and after is not None and before.value is not None and after.value is not None:
            gain = results.find_gain(last, main_arm, _PAIRED_METRICS.get(metric, metric))
            paired = "" if gain is None or gain.value is None else f"paired difference {_format_signed(gain)}"
            facts.append(KeyFigure(f"{heading}, base → {last}", f"{before.value:.3f} → {after.value:.3f}", paired))
    blind = results.blind.arms.get(blind_baseline.BLIND_ARM, {}).get(headline)
    if blind is not None and blind.value is not None:
        note = f"the blind baseline, fitted on {results.blind.fitted_on}"
        facts.append(KeyFigure("Accuracy without the image", f"{blind.value:.3f}", note))
    candidates = sum(int(_read_report(folder, layout.PANEL_REPORT_FILE).get("candidates", 0)) for folder in folders)
    pairs = sum(int(_read_report(folder, layout.PAIRS_REPORT_FILE).get("pairs", 0)) for folder in folders)
    return [
        *facts,
        KeyFigure("Preference pairs", f"{pairs:,}", f"from {candidates:,} candidates in {len(folders)} rounds"),
    ]


def _format_signed(interval: Interval) -> str:
    return format_interval(interval, signed=True).replace("-", "−")


def _format_round_name(folder: Path) -> str:
    return f"round {layout.parse_round_number(folder)}"


def _summarise_round(
    run: Path, folder: Path, about: RunFile, benchmark: Path, arm: str, pictures: gallery.PageImages
) -> RoundSummary:
    number, path = layout.parse_round_number(folder), folder / layout.DECISION_FILE
    data = _describe_round_data(
        _read_report(folder, layout.PANEL_REPORT_FILE), _read_report(folder, layout.PAIRS_REPORT_FILE)
    )
    if not path.is_file():
        return RoundSummary(number, None, data)
    decision = read_json_model(path, Decision)
    explanation = "" if decision.verdict == "promote" else explain_decision(decision)
    summary = RoundSummary(number, decision, data, explanation=explanation)
    evidence = folder / layout.EVIDENCE_FILE
    if not evidence.is_file() or evidence.stat().st_size == 0:  # nothing could be compared
        return summary
    by_digest: dict[str, tuple[Path, PromptFormat]] = {}
    for _, outcomes, views in _find_policies(run, layout.list_round_folders(run), about):
        first = next(jsonl.read_records(outcomes, Outcome))
        by_digest[first.policy] = (outcomes, views)
    named = {"champion": decision.champion, "challenger": decision.challenger}
    sides = [(name, *by_digest[digest]) for name, digest in named.items() if digest in by_digest]
    if len(sides) < len(named):  # the champion is from another run, so its outcomes and regions are not available
        return summary
    examples, won, lost = gallery.select_discordant_examples(
        evidence, sides, benchmark, arm, pictures, _DISCORDANT_COUNT
    )
    return replace(summary, discordant=tuple(examples), won=won, lost=lost)


def _describe_round_data(panel: Mapping[str, Any], pairs: Mapping[str, Any]) -> str:
    """Describe a round's preference data in a few sentences, from the reports of the panel and of the pairs."""
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
        if pairs["pairs"] and "same_text" in pairs:
            parts.append(
                f"They differ in the answer alone in {pairs['same_region'] / pairs['pairs']:.0%} of cases, in the "
                f"region alone in {pairs['same_text'] / pairs['pairs']:.0%}, otherwise in both."
            )
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in pairs["dropped"].items())
        parts += [f"Dropped: {dropped}."] if dropped else []
    return " ".join(parts)


def _read_report(folder: Path, name: str) -> dict[str, Any]:
    """Read a stage's report; empty if the round has not reached that stage."""
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
        raise InvalidRecord(f"{path}: expected a list of objects, one for each logged step")
    return content


def _list_films(pictures: gallery.PageImages) -> list[tuple[str, str, float, float]]:
    """List the films as (element id, data URI, width, height), with sizes in drawing units."""
    films = []
    for name, (uri, study) in pictures.films.items():
        scale = figures.FILM_UNITS / max(study.width, study.height)
        films.append((name, uri, round(study.width * scale, 1), round(study.height * scale, 1)))
    return films


def _build_provenance(run: Path, about: RunFile, folders: Sequence[Path]) -> list[tuple[str, str, str]]:
    """List (name, digest, note); folders without their paths, so that the page does not depend on the location."""
    base = read_json_model(run / "base" / layout.BENCHMARK_REPORT_FILE, BenchmarkReport)
    rows = [("base policy", base.policy, Path(about.policy).name)]
    for folder, checkpoint in layout.iter_checkpoints(run):
        rows.append((str(folder.relative_to(run)), checkpoint.sha256, _describe_checkpoint(checkpoint)))
    judges: dict[str, str] = {}
    for folder in folders:
        judges |= layout.read_judge_names(folder)
    sources = {judge.name: Path(judge.path).name or "endpoint" for judge in about.judges}
    rows += [(name, digest, f"judge, {sources.get(name, 'not in run.json')}") for digest, name in judges.items()]
    if about.recipe is not None:
        rows.append(("recipe", about.recipe.digest, about.recipe.describe()))
    return [*rows, ("benchmark", base.benchmark, Path(about.benchmark).name)]


def _describe_checkpoint(checkpoint: Checkpoint) -> str:
    digests = (("parent", checkpoint.parent), ("pairs", checkpoint.pairs), ("train section", checkpoint.config))
    parts = [f"{name} {value[:12]}" for name, value in digests if value]
    return ", ".join([checkpoint.id, *parts, *([f"git {checkpoint.git}"] if checkpoint.git else [])])
