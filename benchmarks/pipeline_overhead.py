"""Cost of orchestration: wall time of a local pipeline against `clincot rounds`, on the demo's first round.

    python -m benchmarks.pipeline_overhead                 the short demo      (make bench-pipeline)
    python -m benchmarks.pipeline_overhead --size full     the whole demo      (make bench-pipeline SIZE=full)

Both run the same round on the same data, one after the other, each in its own folder. They must end with the same
digests, and the pipeline may take at most 1.25 times as long. The exit code is 0 if both hold.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from clincot.demo.walkthrough import plan_radiograph_rounds
from clincot.runs import history
from clincot.storage.digests import hash_path
from clincot.storage.open import open_store

MAX_RATIO = 1.25
ROOT = Path(__file__).resolve().parents[1]
CHECKED_FILES = {
    "candidates": "candidates.jsonl",
    "scores": "scores.jsonl",
    "pairs": "pairs.jsonl",
    "checkpoint": "policy",
    "outcomes": "outcomes.jsonl",
    "decision": "decision.json",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["short", "full"], default="short", help="Size of the demo.")
    size = parser.parse_args().size
    with tempfile.TemporaryDirectory(prefix="clincot-overhead-") as scratch:
        folder = Path(scratch)
        plan = plan_radiograph_rounds(folder, short=size == "short")
        params = plan.params.model_dump(mode="json")
        del params["preflight"]
        (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        common = [
            "--data",
            str(plan.data),
            "--benchmark",
            str(plan.benchmark),
            "--policy",
            str(plan.policy),
            "--blind-from",
            str(plan.data),
            "--params",
            str(folder / "params.yaml"),
        ]
        plain = _time_command("rounds", "--run", str(folder / "plain"), *common)
        local = _time_command("pipeline", "run-local", "--run", str(folder / "local"), "--no-deploy", *common)
        again = _time_command("pipeline", "run-local", "--run", str(folder / "local"), "--no-deploy", *common)
        digests = history.read_round_outputs(open_store(str(folder / "local" / "store")), "clincot", 1).digests
        round_folder = folder / "plain" / "round-01"
        different = [name for name, file in CHECKED_FILES.items() if digests[name] != hash_path(round_folder / file)]
    wall_ratio, cpu_ratio = local[0] / plain[0], local[1] / plain[1]
    print(f"plain command line   {plain[0]:7.1f} s, {plain[1]:7.1f} s of processor time   ({size} demo, one round)")
    print(f"local pipeline       {local[0]:7.1f} s, {local[1]:7.1f} s of processor time")
    print(f"the same again       {again[0]:7.1f} s, {again[1]:7.1f} s of processor time")
    print(f"ratio                {wall_ratio:.2f} (bound {MAX_RATIO}), of processor time {cpu_ratio:.2f}")
    print(f"digests              {'equal' if not different else 'different: ' + ', '.join(different)}")
    return 1 if different or wall_ratio > MAX_RATIO else 0


def _time_command(*arguments: str) -> tuple[float, float]:
    """Return wall and processor seconds of a `clincot` command; on a busy machine, compare the latter."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "clincot.cli.app", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode != 0:
        raise SystemExit(f"clincot {' '.join(arguments[:2])} failed: {done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - started, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
