"""Measure which term of the loss moves the weights: the preference, the margin in it, or the anchor.

A probe differentiates the terms of one batch separately, which costs a backward pass for each of them: somewhat more
than a step. A run has a few probes only (`list_probe_steps`), at most one in ten steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

PROBES = 8  # in a training run, evenly spread from the first step on
MIN_SPACING = 10  # steps from probe to probe: a probe costs about a step, and short runs should not pay twice
MAX_PROBED_WEIGHTS = (
    1_000_000_000  # trained weights above which the additional gradients would not fit beside the model
)


def list_probe_steps(steps: int) -> frozenset[int]:
    """The 0-based steps at which a run of `steps` steps is probed: the first one, and up to PROBES in all."""
    return frozenset(range(0, steps, max(MIN_SPACING, math.ceil(steps / PROBES))))


def can_probe(parameters: Sequence[torch.nn.Parameter], *, sharded: bool) -> bool:
    """Whether the gradients of single terms can be computed: not if weights are sharded, nor if they are too many."""
    return not sharded and sum(parameter.numel() for parameter in parameters) <= MAX_PROBED_WEIGHTS


def measure_terms(
    preference: torch.Tensor,
    preference_without_margin: torch.Tensor,
    others: Sequence[torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
) -> Mapping[str, float]:
    """Compare the gradients of the terms of a loss, each a scalar that is part of the same graph.

    Returns
    - preference_share: |g| / (|g| + sum of |g_other|), with g the gradient of `preference` and g_other that of each
      other term, weights included: 0 if the preferences move nothing, 1 if nothing else does;
    - margin_share: the sine of the angle between g and the gradient of the preference without its margin: 0 if the
      margin only scales the step, 1 if it points the step in a direction of its own.
    Both are 0 where the gradient of the preference vanishes. `parameters` are the trained weights; their `grad` is not
    touched.
    """
    g = _differentiate(preference, parameters)
    norm = _norm(g)
    without = _differentiate(preference_without_margin, parameters)
    product = norm * _norm(without)
    cosine = _dot(g, without) / product if product else 1.0
    del g, without  # one gradient is as large as the trained weights
    total = norm + sum(_norm(_differentiate(term, parameters)) for term in others)
    return {
        "preference_share": norm / total if total else 0.0,
        "margin_share": math.sqrt(max(0.0, 1 - cosine**2)),
    }


def _differentiate(term: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    if not term.requires_grad:
        return []
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]


def _dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def _norm(gradient: Sequence[torch.Tensor]) -> float:
    return math.sqrt(_dot(gradient, gradient))
