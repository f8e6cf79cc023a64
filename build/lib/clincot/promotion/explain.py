"""A decision as Markdown, and an explanation of what a promotion would need.

The Markdown is shown in the terminal and on the pages of pipelines. Reasons and findings are content of the decision
record; all other wording belongs to this module.
"""

from __future__ import annotations

from clincot.promotion.checks import METRIC_NAMES
from clincot.promotion.power import minimum_detectable_gain, required_sample_size
from clincot.records import Decision, Interval, PromotionCheck
from clincot.text import format_interval, markdown_table

VERDICT_SENTENCES = {
    "promote": "The challenger replaces the champion.",
    "keep": "The champion stays.",
    "blocked": "Blocked: the comparison cannot be trusted, and nothing was tested.",
}


def render_decision(decision: Decision) -> str:
    """Render a decision with all its content as Markdown; equal decisions give equal bytes."""
    lines = [
        f"# {decision.verdict}",
        "",
        f"{VERDICT_SENTENCES[decision.verdict]} ({decision.metric})",
        "",
        f"- champion `{decision.champion}`",
        f"- challenger `{decision.challenger}`",
        f"- benchmark `{decision.benchmark}`",
        f"- decision `{decision.id}`",
    ]
    if decision.base is not None:
        lines.append(f"- challenger minus base policy: {_format_difference(decision.base)} (not tested)")
    lines += ["", "## Reasons", "", *(f"- {reason}" for reason in decision.reasons)]
    if decision.checks:
        lines += ["", "## Checks", "", _render_checks(decision)]
    if decision.findings:
        rows = [[finding.name, finding.reason, _SEVERITY_LABELS[finding.severity]] for finding in decision.findings]
        lines += ["", "## Data and judges", "", markdown_table(["check", "finding", ""], rows)]
    lines += [*_render_budget(decision), *_render_inputs(decision)]
    return "\n".join([*lines, ""])


def _render_checks(decision: Decision) -> str:
    head = [
        "check",
        "challenger",
        "other",
        "difference, 95 % interval",
        "all looks",
        "must be",
        "bound",
        "p",
        "n",
        "patients",
        "",
    ]
    pooled = decision.budget is not None and decision.budget.look > 1
    rows = []
    for check in decision.checks:
        other = "blind" if check.role == "blind" else "champion"
        rows.append(
            [
                f"{METRIC_NAMES.get(check.name, check.name)} vs {other}",
                _format_number(check.challenger),
                _format_number(check.other),
                _format_difference(check.difference),
                _format_signed(check.pooled) if pooled else "=",
                f"{'>' if check.better == 'higher' else '<'} {check.threshold:+g}",
                _format_signed(check.bound),
                "–" if check.p is None else f"{check.p:.2g}",
                f"{check.n}",
                f"{check.clusters}",
                "passed" if check.passed else "**not shown**",
            ]
        )
    return markdown_table(head, rows)


def _render_budget(decision: Decision) -> list[str]:
    lines = []
    if (b := decision.budget) is not None:
        lines += [
            "",
            "## Lifetime budget",
            "",
            f"Test {b.number} of the ledger: challenger {b.challenger_number}, look {b.look}. The test level is "
            f"{b.level:.6f}, from {b.challenger_level:.6f} for this challenger ({b.passed_on:.6f} of it passed on by a "
            f"promotion). The lifetime budget is {b.lifetime:g}; earlier tests spent {b.spent_before:.6f} of it.",
        ]
    if (r := decision.reuse) is not None:
        lines += [
            "",
            "## Questions",
            "",
            f"Slice {r.slice} of {r.slices}: {r.questions} questions, {r.fresh} of them new. Uses of the most used "
            f"question, including this decision: {r.most_uses} of {r.allowed} allowed. Overused questions left out: "
            f"{r.worn}.",
        ]
    return lines


def _render_inputs(decision: Decision) -> list[str]:
    if not decision.inputs:
        return []
    return ["", "## Inputs", "", *(f"- {name} `{digest}`" for name, digest in decision.inputs.items())]


def explain_decision(decision: Decision) -> str:
    """Explain in sentences what would have to change for a promotion."""
    if decision.verdict == "promote":
        return "The challenger is promoted; nothing has to change."
    if decision.verdict == "blocked":
        head = "Nothing was tested and no budget was spent. Resolve these problems before the next decision:"
        return "\n".join([head, *(f"- {reason}" for reason in decision.reasons)])
    failed = [check for check in decision.checks if not check.passed]
    if not decision.checks:
        return "\n".join(decision.reasons)
    lines = ["For a promotion:"] if failed else []
    level = 0.0 if decision.budget is None else decision.budget.level
    lines += [f"- {_describe_change(check, level, decision)}" for check in failed]
    off = next((f for f in decision.findings if f.name == "off format" and f.severity != "ok"), None)
    if off is not None and off.value is not None and off.threshold is not None:
        lines.append(
            f"- At most {off.threshold:.1%} of the challenger's answers may be off format; {off.value:.1%} are."
        )
    return "\n".join(lines)


def _describe_change(check: PromotionCheck, level: float, decision: Decision) -> str:
    name = METRIC_NAMES.get(check.name, check.name)
    other = "the blind baseline's" if check.role == "blind" else "the champion's"
    if check.pooled is None or check.error is None or check.bound is None:
        return f"The {name} has to be measured on more patients: {check.clusters} are too few to show anything."
    side = "above" if check.better == "higher" else "below"
    head = (
        f"The bound of the difference between the challenger's {name} and {other} has to be {side} "
        f"{check.threshold:+g}; it is {check.bound:+.3f} (difference {check.pooled:+.3f}, {check.n} questions)."
    )
    if check.error == 0:
        return head
    needed = required_sample_size(check, level, check.pooled)
    detectable = minimum_detectable_gain(check, level, check.n)
    size = f" This number of questions shows a true difference of {detectable:+.3f} four times in five."
    if needed is None:
        return (
            f"{head} The observed difference is on the wrong side of the threshold: more questions will not help, but "
            f"a better challenger may.{size}"
        )
    benchmark = max(needed, round(needed * decision.checks[0].n / check.n))
    return (
        f"{head}{size} If the true difference is {check.pooled:+.3f}, a benchmark of about {benchmark:,} questions "
        "would show it."
    )


def _format_difference(interval: Interval) -> str:
    return format_interval(interval, signed=True, missing=f"– ({interval.n_unscored} unscored)")


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _format_signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


_SEVERITY_LABELS = {"ok": "ok", "warn": "**warning**", "block": "**blocks**"}
