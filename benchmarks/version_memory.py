"""Memory of pair → version → read back: `python -m benchmarks.version_memory [pairs]` (100,000), a process a step.

Candidates and scores are written without a model (tests/support/preference_data.py: two pairs a question). The version goes
into a git repository and an S3 server made for the occasion; reading back fetches the pairs and compares them with
themselves, as `clincot data diff` does,
which holds a few numbers of every pair.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ALLOWED_MB = 1000.0
BUCKET = "bench"


def main() -> int:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    from tests.support.preference_data import write_judged
    from tests.support.s3_server import s3_server

    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch, s3_server(Path(scratch) / "s3") as server:
        server.bucket(BUCKET)
        os.environ.update(server.environment)
        folder = Path(scratch) / "round"
        started = time.perf_counter()
        write_judged(folder, -(-pairs // 2))
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{pairs:,} pairs to be made; {size / 1e6:.0f} MB written in {time.perf_counter() - started:.0f} s")
        for name in STEPS:
            worst = max(worst, run_in_process(name, Path(scratch)))
    print(f"most memory at once: {worst:.0f} MB (allowed: {ALLOWED_MB:.0f})")
    return int(worst > ALLOWED_MB)


def run_in_process(step: str, scratch: Path) -> float:
    """Run the step in a process of its own; returns its peak resident memory, that of its commands included, in MB."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.version_memory", "--step", step, str(scratch)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    own, below = (float(part) for part in done.stdout.split()[-2:])
    print(f"{step:>8}: {own:6.0f} MB, its git and dvc commands {below:5.0f} MB, {time.perf_counter() - started:.0f} s")
    return max(own, below)


def make_benchmark_pairs(scratch: Path) -> None:
    from tests.support.preference_data import make_pairs_of

    make_pairs_of(scratch / "round")


def commit_version(scratch: Path) -> None:
    from clincot.config import VersionConfig
    from clincot.preferences.versions.init import init_repository
    from clincot.stages.runner import run_stage
    from tests.support.preference_data import paths_in

    init_repository(str(scratch / "data.git"), f"s3://{BUCKET}/rounds")
    config = VersionConfig(repository=str(scratch / "data.git"))
    run_stage("version", config, paths_in(scratch / "round"), {"version": scratch / "round" / "version.json"})


def read_back(scratch: Path) -> None:
    from clincot.config import VersionConfig
    from clincot.preferences.versions.version_history import diff_versions

    config = VersionConfig(repository=str(scratch / "data.git"))
    _, kept, between = diff_versions(config, "1", "1", scratch / "read")
    assert between.unchanged == kept.pairs > 0
    print(f"{kept.pairs:,} pairs read back", file=sys.stderr)


STEPS: dict[str, Callable[[Path], None]] = {"pair": make_benchmark_pairs, "version": commit_version, "read": read_back}


def run_step(name: str, scratch: Path) -> int:
    STEPS[name](scratch)
    peaks = (resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(*peaks)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_step(sys.argv[2], Path(sys.argv[3])) if sys.argv[1:2] == ["--step"] else main())
