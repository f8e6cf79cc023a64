"""Any values that the schema allows give objects that a cluster accepts and that stay closed, or a sentence.

    make fuzz-chart DRAWS=20000 SEED=7

A draw changes a profile at one to six places. The values of a failure are printed as they can be passed to Helm.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from jsonschema import Draft7Validator

from tests.chart.batch_rendering import Rendering, render_batch
from tests.chart.draw_checks import list_defects
from tests.chart.value_draws import (
    KSERVE_ROUTE,
    Change,
    ValueDraws,
    apply_changes,
    merge,
    read_bases,
    read_value,
)

Json = dict[str, Any]
DRAWS = int(os.environ.get("CLINCOT_DRAWS", "2000"))
SEED = int(os.environ.get("CLINCOT_SEED", "16"))
BATCH = 200


class Draw(NamedTuple):
    base: Json
    changes: list[Change]
    mistake: Change | None = None

    @property
    def values(self) -> Json:
        return apply_changes(self.base, [*self.changes, *([self.mistake] if self.mistake else [])])


def draw_values(count: int, seed: int) -> list[Draw]:
    """Return draws, of which every fourth has a mistake."""
    draws, bases = ValueDraws(seed), read_bases()
    found = []
    for index in range(count):
        base, changes = draws.random.choice(bases), draws.draw_changes()
        mistaken = index % 4 == 0
        found.append(Draw(base, changes, draws.draw_mistake(apply_changes(base, changes)) if mistaken else None))
    return found


def refuse_values(validator: Draft7Validator, values: Json) -> list[str]:
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(values)]


def render_all(draws: Sequence[Draw]) -> list[tuple[Draw, Rendering]]:
    found: list[tuple[Draw, Rendering]] = []
    for start in range(0, len(draws), BATCH):
        part = draws[start : start + BATCH]
        found += zip(part, _render_some(part), strict=True)
    return found


def _render_some(draws: Sequence[Draw]) -> list[Rendering]:
    """Render draws together; halve them to find one for which a template fails."""
    try:
        return render_batch([draw.values for draw in draws])
    except RuntimeError as error:
        if len(draws) == 1:
            return [Rendering("", (), f"%!s(<nil>) a template failed: {error}")]
        half = len(draws) // 2
        return [*_render_some(draws[:half]), *_render_some(draws[half:])]


def explain_draw(draw: Draw) -> str:
    changes = [*draw.changes, *([draw.mistake] if draw.mistake else [])]
    return "; ".join(f"{'.'.join(map(str, one.path))}={json.dumps(one.value)}" for one in changes)


@pytest.mark.slow
def test_any_values_are_refused_or_valid_and_closed() -> None:
    draws = draw_values(DRAWS, SEED)
    validator = Draft7Validator(ValueDraws(0).schema)
    refused = [(draw, refuse_values(validator, draw.values)) for draw in draws]
    accepted = [draw for draw, errors in refused if not errors]
    results = [
        (draw, result.problems, [] if result.problems else list_defects(draw.values, result))
        for draw, result in render_all(accepted)
    ]
    failures = [f"{explain_draw(draw)}\n    " + "\n    ".join(defects[:3]) for draw, _, defects in results if defects]
    assert not failures, f"{len(failures)} of {len(results)}:\n" + "\n".join(sorted(failures, key=len)[:20])
    rendered = sum(not problems for _, problems, _ in results)
    print(Counter(refused=len(draws) - len(accepted), contradictory=len(results) - rendered, rendered=rendered))
    assert rendered > DRAWS / 3


# What YAML reads as a truth value, as nothing, or as a number, if it is not quoted.
OTHER_TYPES = ("y", "null", "1e3")


@pytest.mark.slow
def test_no_text_becomes_a_truth_value_or_a_number() -> None:
    """Every text that the schema allows to be one of these words, in the production profile with a route."""
    draws = ValueDraws(0)
    validator = Draft7Validator(draws.schema)
    first = {"monitoring": {"serviceMonitor": True}, "server": {"first": {"enabled": True}}}
    base = merge(merge(read_bases()[-2], KSERVE_ROUTE), first)
    texts = [path for path in draws.paths if isinstance(read_value(base, path), str)]
    trials = [Draw(base, [Change(path, word)]) for path in texts for word in OTHER_TYPES]
    accepted = [trial for trial in trials if not refuse_values(validator, trial.values)]
    assert len(accepted) > 50
    failures = []
    for trial, result in render_all(accepted):
        if not result.problems:
            failures += [f"{explain_draw(trial)}: {defect}" for defect in list_defects(trial.values, result)]
    assert failures == []
