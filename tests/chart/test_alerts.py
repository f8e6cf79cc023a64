"""The chart's alert rules are what Prometheus accepts, and fire when they should, to the minute.

The cases are in alert_cases.yaml, for `promtool test rules`; `make promtool` gets promtool.
"""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.chart.batch_rendering import render_batch
from tests.chart.binaries import NoBinaries, find_promtool
from tests.chart.draw_checks import parse_documents
from tests.chart.rendering import ROOT, Json, of_kind, rendered
from tests.chart.value_draws import Change, ValueDraws, apply_changes, find_schema, merge, read_bases

CASES = Path(__file__).with_name("alert_cases.yaml")
MINUTE = re.compile(r"(\d+)m")


def run_promtool(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run promtool in a folder; skip the test if it is not installed."""
    try:
        command = find_promtool()
    except NoBinaries as missing:
        pytest.skip(str(missing))
    return subprocess.run([command, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def render_rules(*flags: str) -> Json:
    """Return the rules of values-production.yaml, as Prometheus reads them from a file."""
    (rule,) = of_kind(rendered("production", *flags), "PrometheusRule")
    spec: Json = copy.deepcopy(rule["spec"])
    return spec


def list_alerts(rules: Json) -> dict[str, Json]:
    return {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"]}


def check_cases(rules: Json, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    (folder / "cases.yaml").write_text(CASES.read_text())
    return run_promtool("test", "rules", "cases.yaml", folder=folder)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--set", "line=x,server.name=y"),
        ("--set", "monitoring.rules.roundsWithoutPromotion=2000001"),
        ("--set-json", "monitoring.rules.judgeAgreement=-0.99,monitoring.rules.errorRate=1e-7"),
        ("--set-json", "monitoring.rules.judgeAgreement=1,monitoring.rules.errorRate=0.999"),
    ],
)
def test_prometheus_accepts_the_rules(flags: tuple[str, ...], tmp_path: Path) -> None:
    rules = render_rules(*flags)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    done = run_promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(list_alerts(rules))} rules found" in done.stdout


def test_prometheus_accepts_the_rules_of_any_values(tmp_path: Path) -> None:
    """A hundred draws of the values that are in the rules, each as two groups of one file."""
    draws = ValueDraws(7)
    places = [("monitoring", "rules"), ("line",), ("server", "name"), ("fullnameOverride",)]
    on = {"monitoring": {"rules": {"enabled": True}}}
    values = []
    for _ in range(100):
        changes = [Change(path, draws.draw_value(find_schema(draws.schema, path))) for path in places]
        values.append(merge(apply_changes(read_bases()[0], changes), on))
    groups: list[Json] = []
    for number, rendering in enumerate(render_batch(values)):
        assert rendering.problems == ""
        (rule,) = of_kind([one for text in rendering.documents for one in parse_documents(text)], "PrometheusRule")
        groups += [{**group, "name": f"{group['name']}-{number}"} for group in rule["spec"]["groups"]]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    done = run_promtool("check", "rules", "--lint=none", "rules.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS: 500 rules found" in done.stdout


def test_alerts_fire_to_the_minute(tmp_path: Path) -> None:
    done = check_cases(render_rules(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_cases_on_both_sides_of_its_time() -> None:
    """An alert with `for: 15m` is silent at one minute of a case and fires at the next."""
    expected = list_alerts(render_rules())
    for name, rule in expected.items():
        fired, silent, at_the_minute = 0, 0, False
        for case in yaml.safe_load(CASES.read_text())["tests"]:
            checks = [one for one in case["alert_rule_test"] if one["alertname"] == name]
            fires = {_read_minutes(one["eval_time"]): bool(one.get("exp_alerts")) for one in checks}
            fired += sum(fires.values())
            silent += len(fires) - sum(fires.values())
            at_the_minute |= any(fires[minute] and fires.get(minute - 1) is False for minute in fires)
        assert (fired > 0, silent > 0, at_the_minute) == (True, True, True), (name, rule.get("for"))


def _read_minutes(text: str) -> int:
    found = MINUTE.fullmatch(text)
    assert found is not None, text
    return int(found[1])


def list_changes(rules: Json) -> Iterator[tuple[str, Json]]:
    """Yield (what is changed, the rules with this change) for every alert: its time, its series and its threshold."""
    for name, rule in list_alerts(rules).items():
        minutes = _read_minutes(rule.get("for", "0m"))
        times = {f"for {minutes + 1}m": {"for": f"{minutes + 1}m"}}
        if minutes:
            times[f"for {minutes - 1}m"] = {"for": f"{minutes - 1}m"}
        expressions = {
            "another namespace too": re.sub(r'namespace="clincot",?', "", rule["expr"]),
            "another line too": re.sub(r',line="clincot"', "", rule["expr"]),
            "a higher threshold": re.sub(r"(==|>=|<|>) ([\d.]+)", lambda m: f"{m[1]} {float(m[2]) + 1}", rule["expr"]),
            "a lower threshold": re.sub(
                r"(==|>=|<|>) ([\d.]+)", lambda m: f"{m[1]} {float(m[2]) * 0.8 - 0.01}", rule["expr"]
            ),
            "all statuses": rule["expr"].replace('status=~"5.."', 'status=~"[45].."'),
        }
        changes = times | {about: {"expr": one} for about, one in expressions.items() if one != rule["expr"]}
        changes["removed"] = {"alert": "Other"}
        for about, change in changes.items():
            changed = copy.deepcopy(rules)
            list_alerts(changed)[name].update(change)
            yield f"{name}: {about}", changed


def test_the_cases_notice_every_change_of_a_rule(tmp_path: Path) -> None:
    changes = dict(list_changes(render_rules()))
    assert len(changes) >= 5 * 5
    unnoticed = [about for about, rules in changes.items() if check_cases(rules, tmp_path).returncode == 0]
    assert unnoticed == []


def test_texts_show_numbers_as_people_write_them() -> None:
    """7 % and not 7.000000000000001 %, 2000000 rounds and not 2e+06."""
    numbers = "monitoring.rules.roundsWithoutPromotion=2e6,monitoring.rules.errorRate=0.07"
    alerts = list_alerts(render_rules("--set-json", numbers))
    assert "more than 7 % of" in alerts["ClincotEndpointFails"]["annotations"]["summary"]
    assert "No promotion in 2000000 rounds" in alerts["ClincotNoPromotion"]["annotations"]["summary"]


def test_ci_does_not_skip_these_tests() -> None:
    """`make promtool` fails if promtool cannot be had, and .ci/run ends then."""
    steps = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [step.partition("#")[0].strip() for step in steps]
    assert commands.index("make promtool") < commands.index("make test")
    assert "set -euo pipefail" in commands
