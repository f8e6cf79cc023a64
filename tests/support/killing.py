"""Run rounds in child processes that are killed (SIGKILL) at one moment after the other, and finally to the end.

Usage: python -m tests.support.killing FOLDER; prints the moments at which a child was killed. It is a separate program
for tests/test_killed.py: it imports everything once and computes nothing itself, so that it can fork its children
instead of starting them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from clincot.rounds import Plan, run_rounds
from tests.support import tiny

# (audit event, path below the folder): the run is killed just before this happens. Each run resumes where the
# previous one was killed, so the moments are in the order of the run.
MOMENTS = (
    ("open", "benchmark/images/1.png"),  # while the base policy is evaluated
    ("os.rename", "run/base/outcomes.jsonl"),  # everything is written, but not under its final name
    ("open", "data/images/3.png"),  # while regions are proposed
    ("open", "run/round-01/candidates.jsonl.*.partial"),  # between two stages
    ("open", "data/images/4.png"),  # while the policy answers
    ("os.rename", "run/round-01/candidates.jsonl.stage.json"),  # the output exists, its stamp does not
    ("os.rename", "run/round-01/scores.jsonl"),  # just before the first of a stage's outputs exists
    ("open", "run/round-01/policy.partial/*checkpoint-2/trainer_state.json"),  # during training
    ("os.rename", "run/round-01/policy"),  # trained, but not under its final name
    ("os.rename", "run/round-01/policy.stage.json"),  # under its final name, without its stamp
    ("os.rename", "run/round-01/decision.json"),
    ("os.rename", "run/results.json"),
)


def plan_in(folder: Path) -> Plan:
    """One round on the smallest models, with a resumable checkpoint after every step of training."""
    policy, *judges = (tiny.write_model(folder / name, seed) for seed, name in enumerate(("policy", "a", "b")))
    params = tiny.params(judges, train={"save_steps": 1}, evaluate={"arms": ["written", "windows"]})
    return Plan(
        run=folder / "run",
        data=tiny.write_set(folder / "data", key=False),
        policy=policy,
        params=params,
        benchmark=tiny.write_set(folder / "benchmark", seed=1, studies=3),
        count=1,
    )


def run_until(plan: Plan, moment: tuple[str, str]) -> bool:
    """Run the plan in a child that is killed at the moment; return False if the run ended before it."""
    child = os.fork()
    if child == 0:
        sys.addaudithook(_killer(plan.run.parent, *moment))
        code = 1
        try:
            run_rounds(plan)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run failed by itself before {moment}")
    return code != 0


def _killer(folder: Path, event: str, pattern: str) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook (PEP 578): Python calls it before every file is opened or renamed."""
    wanted = str(folder / pattern)

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        if name == event:
            path = arguments[1 if name == "os.rename" else 0]
            if isinstance(path, str | os.PathLike) and fnmatch(os.fspath(path), wanted):
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def main() -> None:
    import trl  # noqa: F401 - imported before the first fork, so that no child has to

    import clincot.models.load
    import clincot.training.margin_dpo  # noqa: F401

    plan = plan_in(Path(sys.argv[1]))
    killed = [moment for moment in MOMENTS if run_until(plan, moment)]
    undisturbed = replace(plan, run=plan.run.with_name("undisturbed"))
    for one in (plan, undisturbed):
        run_until(one, ("never", ""))
    print(json.dumps(killed))


if __name__ == "__main__":
    main()
