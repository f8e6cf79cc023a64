"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from clincot.planning.cost_plan import CostPlan, Fit, PlanRow
from clincot.planning.gpu_memory import GIB, format_gib
from clincot.planning.gpu_memory import format_count as format_weights
from clincot.planning.planned_models import PlannedModel
from clincot.planning.sampled_data import DataSize
from clincot.text import align_columns, format_count, markdown_table

LEFT_OUT = (
    "Not in it: loading models, queues and transfers, servers of judges and of the http grounder, and the grading of "
    "free answers (evaluate.open_judges)."
)


def render_plan(plan: CostPlan) -> str:
    """The whole plan as text."""
    request = plan.request
    gpu = request.gpu
    recipe = request.params.recipe.name or "neutral defaults"
    rounds, seeds = format_count(request.round_count, "round"), format_count(request.seeds, "seed")
    sheet = f"{gpu.bf16_tflops:g} TFLOP/s in bfloat16, {gpu.bandwidth_gbs:g} GB/s, {gpu.memory_gb:g} GB: {gpu.source}"
    lines = [
        ("plan", f"{recipe}: {rounds}, {seeds}, on {gpu.name} ({sheet})"),
        *((model.name, _describe_model(model)) for model in (plan.policy, *plan.judges)),
        ("data", _describe_data(plan)),
        ("benchmark", f"{plan.benchmark.rounds[0]:,} questions about {plan.benchmark.images:,} images"),
    ]
    return "\n".join([*align_columns(lines), "", render_costs(plan), "", _render_assumptions(plan)])


def render_costs(plan: CostPlan) -> str:
    """The plan's tables and totals, without models, data and assumptions."""
    return "\n".join(
        [
            _render_stages(plan),
            "",
            *_list_totals(plan),
            "",
            _render_fits(plan.fits),
        ]
    )


def summarize_plan(plan: CostPlan) -> str:
    """One line: hours, memory, storage and cost."""
    parts = [
        f"{plan.total_hours:,.1f} GPU-hours for {format_count(plan.request.round_count, 'round')} "
        f"({plan.request.gpu.name})",
        f"{format_gib(plan.memory / GIB)} GiB of GPU memory",
        f"{sum(plan.storage.values()) / 1e9:,.1f} GB of storage",
    ]
    if plan.cost is not None:
        parts.append(_format_cost(plan.cost))
    return ", ".join(parts)


def _describe_model(model: PlannedModel) -> str:
    counted = "prompts counted by its processor" if model.exact else "prompts estimated"
    size = "" if model.size is None else f"{format_weights(model.size.total)} weights, "
    return f"{size}{counted} ({model.source})"


def _describe_data(plan: CostPlan) -> str:
    data, source = plan.data, plan.request.data
    where = "given" if isinstance(source, DataSize) else str(source)
    rounds = ", ".join(f"{count:,}" for count in dict.fromkeys(data.rounds))
    habits = "" if plan.request.like is None else f"; habits of {plan.request.like}"
    return (
        f"{rounds} questions a round, {data.images:,} images in all ({where}); "
        f"counted on {format_count(len(data.questions), 'question')}{habits}"
    )


def _render_stages(plan: CostPlan) -> str:
    head = ("a round", "model", "requests", "M read", "M written", "pictures", "GPU-hours", "GiB", "MB kept")
    rows = [_render_row(row) for row in plan.rows if row.calls.requests or row.record_bytes]
    base = ("base policy: evaluate", *_render_row(plan.base)[1:])
    return markdown_table(head, [*rows, base], layout="aligned")


def _render_row(row: PlanRow) -> tuple[str, ...]:
    calls = row.calls
    if not calls.requests:  # a stage that asks no model
        return (
            row.stage,
            row.model if row.stage != "pair" else "",
            "",
            "",
            "",
            "",
            "",
            "",
            f"{row.record_bytes / 1e6:,.1f}",
        )
    return (
        row.stage,
        row.model,
        f"{calls.requests:,.0f}",
        f"{calls.prompt_tokens / 1e6:,.2f}",
        f"{calls.new_tokens / 1e6:,.2f}",
        f"{calls.encodes:,.0f}",
        "not known" if row.time is None else f"{row.gpu_hours:,.3f}",
        format_gib(row.memory / GIB) if row.memory else "",
        f"{row.record_bytes / 1e6:,.1f}",
    )


def _list_totals(plan: CostPlan) -> Iterator[str]:
    request = plan.request
    gpu, rounds = request.gpu, format_count(request.round_count, "round")
    seeds = "" if request.seeds == 1 else f" and {request.seeds} seeds"
    hours = f"{plan.total_hours:,.1f} GPU-hours ({gpu.name})"
    yield f"total: {hours} for {rounds}{seeds}, {plan.round_hours:,.2f} for the first round"
    if plan.cost is None:
        yield f"cost: no price of {gpu.name} is known; give one with --price"
    else:
        source = f" ({gpu.price_source})" if gpu.price_source else ""
        yield f"cost: {_format_cost(plan.cost)} at {_format_price(gpu.price)} an hour{source}"
    kept = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in plan.storage.items() if size)
    yield f"storage: {sum(plan.storage.values()) / 1e9:,.1f} GB ({kept})"
    yield (
        f"shards: {plan.shards} a round, {plan.generation_hours / plan.shards:.2f} hours of propose, answer and judge "
        f"each; {plan.counts.candidates:,.0f} candidates, {plan.counts.pairs:,.0f} pairs a round"
    )
    yield LEFT_OUT


def _format_cost(cost: tuple[float, float]) -> str:
    low, high = (f"{value:,.0f}" if value >= 10 else f"{value:,.2f}" for value in cost)
    return f"USD {low}" if low == high else f"USD {low} to {high}"


def _format_price(price: tuple[float, float] | None) -> str:
    assert price is not None
    return f"USD {price[0]:.2f}" if price[0] == price[1] else f"USD {price[0]:.2f} to {price[1]:.2f}"


def _render_fits(fits: Sequence[Fit]) -> str:
    """Which work fits on how many GPUs of each kind, a row for each work."""
    gpus = list(dict.fromkeys(fit.gpu for fit in fits))
    rows = []
    for what in dict.fromkeys(fit.what for fit in fits):
        cells = {fit.gpu: _format_fit(fit) for fit in fits if fit.what == what}
        rows.append((what, *(cells[gpu] for gpu in gpus)))
    return markdown_table(("fits (GiB on each GPU)", *gpus), rows, layout="aligned")


def _format_fit(fit: Fit) -> str:
    if not fit.gpus:
        return f"no ({format_gib(fit.gib)})"
    sharded = f"FSDP x {fit.gpus}" if fit.gpus > 1 else "1 GPU"
    return f"{sharded} ({format_gib(fit.gib)})"


def _render_assumptions(plan: CostPlan) -> str:
    rows = [
        (name, f"{value:g}", meaning, source) for name, value, meaning, source in plan.request.assumptions.describe()
    ]
    return markdown_table(("assumed", "value", "meaning", "source"), rows, layout="aligned")


def describe_plan_json(plan: CostPlan) -> dict[str, Any]:
    """The plan as a JSON object: numbers unrounded, sizes in bytes, times in hours and seconds."""
    request = plan.request
    return {
        "recipe": request.params.recipe.name,
        "gpu": request.gpu.model_dump(mode="json"),
        "rounds": request.round_count,
        "seeds": request.seeds,
        "models": [_describe_model_json(model) for model in (plan.policy, *plan.judges)],
        "data": {"questions": list(plan.data.rounds), "images": plan.data.images, "sample": len(plan.data.questions)},
        "benchmark": {"questions": plan.benchmark.rounds[0], "images": plan.benchmark.images},
        "stages": [_describe_row_json(row) for row in plan.rows],
        "base": _describe_row_json(plan.base),
        "candidates": plan.counts.candidates,
        "pairs": plan.counts.pairs,
        "total": {
            "gpu_hours": plan.total_hours,
            "gpu_hours_first_round": plan.round_hours,
            "cost_usd": plan.cost,
            "storage_bytes": plan.storage,
            "memory_bytes": plan.memory,
            "shards": plan.shards,
        },
        "fits": [asdict(fit) for fit in plan.fits],
        "assumptions": {
            name: {"value": value, "meaning": meaning, "source": source}
            for name, value, meaning, source in request.assumptions.describe()
        },
    }


def _describe_model_json(model: PlannedModel) -> dict[str, Any]:
    weights = None if model.size is None else model.size.total
    return {"name": model.name, "weights": weights, "source": model.source, "exact": model.exact}


def _describe_row_json(row: PlanRow) -> dict[str, Any]:
    return {
        "stage": row.stage,
        "model": row.model,
        **asdict(row.calls),
        "gpu_hours": row.gpu_hours,
        "seconds": None if row.time is None else asdict(row.time),
        "memory_bytes": row.memory,
        "record_bytes": row.record_bytes,
    }
