"""A decision as Markdown (for the terminal and for pipelines' pages), and what would have to change, in sentences."""

from __future__ import annotations

from clincot.promotion.checks import METRIC_NAMES
from clincot.promotion.power import minimum_detectable_gain, required_sample_size
from clincot.records import Decision, Interval, PromotionCheck

VERDICT_SENTENCES = {
    "promote": "The challenger takes the champion's place.",
    "keep": "The champion stays.",
    "blocked": "Blocked: the comparison cannot be trusted, nothing was tested.",
}


def render_decision(decision: Decision) -> str:
    """Everything that the record has, the same bytes for the same decision."""
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
        lines.append(f"- challenger minus the base policy: {_format_interval(decision.base)} (not tested)")
    lines += ["", "## Reasons", "", *(f"- {reason}" for reason in decision.reasons)]
    if decision.checks:
        lines += ["", "## Checks", "", *_render_checks(decision)]
    if decision.findings:
        lines += ["", "## Data and judges", "", "| look | found | |", "|---|---|---|"]
        lines += [
            f"| {f.name} | {_escape_cell(f.reason)} | {_format_severity(f.severity)} |" for f in decision.findings
        ]
    lines += [*_render_budget(decision), *_render_inputs(decision)]
    return "\n".join([*lines, ""])


def _render_checks(decision: Decision) -> list[str]:
    pooled = decision.budget is not None and decision.budget.look > 1
    lines = [
        "| check | challenger | other | difference, 95 % interval | all looks | must be | bound | p | n | patients | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in decision.checks:
        against = "blind" if c.role == "blind" else "champion"
        lines.append(
            f"| {METRIC_NAMES.get(c.name, c.name)} vs {against} | {_format_number(c.challenger)} | {_format_number(c.other)} "
            f"| {_format_interval(c.difference)} | {_format_signed(c.pooled) if pooled else '='} "
            f"| {'>' if c.better == 'higher' else '<'} {c.threshold:+g} | {_format_signed(c.bound)} "
            f"| {'–' if c.p is None else f'{c.p:.2g}'} | {c.n} | {c.clusters} "
            f"| {'passed' if c.passed else '**not shown**'} |"
        )
    return lines


def _render_budget(decision: Decision) -> list[str]:
    lines = []
    if (b := decision.budget) is not None:
        lines += [
            "",
            "## Lifetime budget",
            "",
            f"Test {b.number} of the ledger: challenger {b.challenger_number}, look {b.look}. Level {b.level:.6f} of "
            f"{b.challenger_level:.6f} for this challenger ({b.passed_on:.6f} passed on by a promotion), of "
            f"{b.lifetime:g} for the pipeline's life; {b.spent_before:.6f} spent before.",
        ]
    if (r := decision.reuse) is not None:
        lines += [
            "",
            "## Questions",
            "",
            f"Slice {r.slice} of {r.slices}: {r.questions} questions, {r.fresh} of them never decided on before, used "
            f"{r.most_uses} times at most with this one ({r.allowed} allowed), {r.worn} left out as worn.",
        ]
    return lines


def _render_inputs(decision: Decision) -> list[str]:
    if not decision.inputs:
        return []
    return ["", "## Inputs", "", *(f"- {name} `{digest}`" for name, digest in decision.inputs.items())]


def explain_decision(decision: Decision) -> str:
    """What would have to change for a promotion, in plain sentences."""
    if decision.verdict == "promote":
        return "The challenger is promoted; nothing has to change."
    if decision.verdict == "blocked":
        head = "Nothing was tested and no budget was spent. Before anything can be decided:"
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
    above = "above" if check.better == "higher" else "below"
    head = (
        f"The bound of the difference between the challenger's {name} and {other} has to be {above} "
        f"{check.threshold:+g}; it is {check.bound:+.3f} (difference {check.pooled:+.3f}, {check.n} questions)."
    )
    if check.error == 0:
        return head
    needed = required_sample_size(check, level, check.pooled)
    at_least = minimum_detectable_gain(check, level, check.n)
    size = f" With so many questions a true difference of {at_least:+.3f} is shown four times in five."
    if needed is None:
        return (
            f"{head} What was seen is on the wrong side: more questions will not help, a better challenger may.{size}"
        )
    benchmark = max(needed, round(needed * decision.checks[0].n / check.n))
    return f"{head}{size} If {check.pooled:+.3f} is true, a benchmark of about {benchmark:,} questions would show it."


def _format_interval(interval: Interval) -> str:
    if interval.value is None:
        return f"– ({interval.n_unscored} unscored)"
    limits = "" if interval.low is None or interval.high is None else f" [{interval.low:+.3f}, {interval.high:+.3f}]"
    return f"{interval.value:+.3f}{limits}"


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _format_signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _format_severity(severity: str) -> str:
    return {"ok": "ok", "warn": "**warning**", "block": "**blocks**"}[severity]


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
