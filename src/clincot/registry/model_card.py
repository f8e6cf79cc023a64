"""The model card of a published checkpoint, rendered from its manifest."""

from __future__ import annotations

from typing import get_args

from clincot.evaluation.answer_protocols import AnswerProtocol, choose_headline
from clincot.evaluation.benchmark_report import METRIC_HEADINGS
from clincot.records import BenchmarkReport, Decision, Interval
from clincot.registry.manifest import Manifest

# metric name in a report -> heading of its column in the table
_METRIC_LABELS = {
    "parsed_accuracy": METRIC_HEADINGS["parsed_accuracy"],
    "llava_med_closed_accuracy": METRIC_HEADINGS["llava_med_closed_accuracy"],
    "accuracy": "accuracy",
    "hit_rate": "region hit-rate",
    "iou": "region IoU",
    "hallucination": "hallucination",
    "off_format": "off format",
}
_PROTOCOL_METRICS = ("parsed_accuracy", "llava_med_closed_accuracy")  # shown only if the gate used the protocol
_ARM_LABELS = {
    "written": "own region",
    "windows": "grounder",
    "relevance": "relevance map",
    "http": "external grounder",
    "random": "random region (control)",
    "wrong": "wrong region (control)",
    "oracle": "the key's region (control)",
    "shuffled": "another patient's image (control)",
    "whole": "whole image (control)",
}
INTENDED_USE = """\
## Intended use and limits

For research on visual question answering about medical images with regions that can be looked at. Not a medical
device: no answer may be used for diagnosis or treatment. The measurements below hold for the benchmark named and no
further; other scanners, projections, age groups and findings were not measured. A region shows where the policy
looked, not that the answer follows from it. Answers of low confidence should be withheld (the server's `abstained`).
"""


def render_model_card(manifest: Manifest) -> str:
    """Render Markdown with the front matter that model hubs read.

    The card contains no date, so a checkpoint always has the same card.
    """
    parts = [
        _render_front_matter(manifest),
        _render_origin(manifest),
        INTENDED_USE,
        _render_benchmark(manifest.report, _find_protocol(manifest.decision)),
        _render_decision(manifest),
    ]
    if manifest.golden:
        parts.append(
            "## Golden questions\n\n"
            f"{len(manifest.golden)} questions with their answers and regions stand in `manifest.json`, their images "
            "in `golden/`. A server of this checkpoint answers them the same; `clincot deploy` checks it.\n"
        )
    return "\n".join(parts)


def _render_front_matter(manifest: Manifest) -> str:
    library = "peft" if manifest.kind == "adapter" else "transformers"
    return (
        f"---\nlicense: {manifest.licence.lower()}\npipeline_tag: image-text-to-text\nlibrary_name: {library}\n---\n\n"
        f"# {manifest.line}, round {manifest.round}\n\nCheckpoint `{manifest.sha256}`.\n"
    )


def _render_origin(manifest: Manifest) -> str:
    rows = [
        ("kind", "an adapter, to be loaded onto its base" if manifest.kind == "adapter" else "all weights"),
        ("base", _format_digest(manifest.base)),
        ("parent", _format_digest(manifest.parent) or "none: a base model"),
        ("preference data", _format_digest(manifest.pairs)),
        ("training configuration", _format_digest(manifest.config)),
        ("judges", ", ".join(f"{judge.name} (`{judge.digest[:12]}`)" for judge in manifest.judges)),
        ("agreement of the judges", "" if manifest.agreement is None else f"Krippendorff's α {manifest.agreement:.3f}"),
        ("licence", manifest.licence),
    ]
    lines = [f"| {name} | {value} |" for name, value in rows if value]
    return "\n".join(["## Origin", "", "| | |", "|---|---|", *lines, ""])


def _find_protocol(decision: Decision | None) -> AnswerProtocol:
    """The protocol by which the gate graded answers."""
    stated = "strict" if decision is None else decision.settings.get("protocol")
    return next((protocol for protocol in get_args(AnswerProtocol) if protocol == stated), "strict")


def _render_benchmark(report: BenchmarkReport | None, protocol: AnswerProtocol) -> str:
    if report is None:
        return "## Benchmark\n\nNot measured.\n"
    reported: set[str] = set()
    for metrics in report.metrics.values():
        reported.update(metrics)
    headline = choose_headline(protocol, reported)
    names = [headline] if headline in reported else []
    names += [name for name in _METRIC_LABELS if name in reported and name not in (*names, *_PROTOCOL_METRICS)]
    rows = [["looks at", "n", *(_METRIC_LABELS[name] for name in names)], ["---"] * (len(names) + 2)]
    for arm, metrics in report.metrics.items():
        counted = metrics.get("accuracy")
        count = (
            ""
            if counted is None
            else f"{counted.n}" + (f" + {counted.n_unscored} unscored" if counted.n_unscored else "")
        )
        rows.append([_ARM_LABELS.get(arm, arm), count, *(_format_interval(metrics.get(name)) for name in names)])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"## Benchmark\n\nBenchmark `{report.benchmark[:20]}`, protocol {report.protocol}; 95 % intervals, clustered "
        f"by patient.\n\n{table}\n"
    )


def _render_decision(manifest: Manifest) -> str:
    decision = manifest.decision
    if decision is None:
        return "## Decision\n\nNone was made about this checkpoint.\n"
    reasons = "\n".join(f"- {reason}" for reason in decision.reasons)
    return (
        f"## Decision\n\n**{decision.verdict}** (`{decision.id}`), against champion `{decision.champion[:20]}`, on "
        f"{decision.metric}: {_format_interval(decision.difference)}.\n\n{reasons}\n"
    )


def _format_interval(interval: Interval | None) -> str:
    if interval is None or interval.value is None:
        return "–"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _format_digest(digest: str) -> str:
    return f"`{digest}`" if digest else ""
