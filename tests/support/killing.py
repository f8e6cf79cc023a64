"""Runs rounds in a child process that is killed (SIGKILL) at one moment after the other, and then to the end.

A process of its own for tests/test_killed.py: it imports everything once and computes nothing, so its children can be
forked instead of started. Usage: python -m tests.support.killing FOLDER; prints at which moments a child was killed.
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

# (event, path below the folder): just before it happens the run is killed. In their order: every run goes on where
# the one before it was killed.
MOMENTS = (
    ("open", "benchmark/images/1.png"),  # in the middle of measuring the base policy
    ("os.rename", "run/base/outcomes.jsonl"),  # all is written, and not yet under its name
    ("open", "data/images/3.png"),  # in the middle of proposing regions
    ("open", "run/round-01/candidates.jsonl.*.partial"),  # a stage has ended, the next one begins
    ("open", "data/images/4.png"),  # in the middle of answering
    ("os.rename", "run/round-01/candidates.jsonl.stage.json"),  # the output is there, the stamp is not
    ("os.rename", "run/round-01/scores.jsonl"),  # the first of a stage's outputs is there
    ("open", "run/round-01/policy.partial/*checkpoint-2/trainer_state.json"),  # in the middle of training
    ("os.rename", "run/round-01/policy"),  # trained, and not yet published
    ("os.rename", "run/round-01/policy.stage.json"),  # published, without its stamp
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
    """Run the plan in a child that dies (SIGKILL) at the moment; False: it ended well before."""
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
    """An audit hook (PEP 578): Python tells it of every file that it is about to open or to rename."""
    wanted = str(folder / pattern)

    def hook(name: str, about: tuple[object, ...]) -> None:
        if name == event:
            path = about[1 if name == "os.rename" else 0]
            if isinstance(path, str | os.PathLike) and fnmatch(os.fspath(path), wanted):
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def main() -> None:
    import trl  # noqa: F401 - before the first child, so that none has to

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
