"""Memory of building preference pairs, storing them as a version, and reading the version back.

    python -m benchmarks.version_memory [pairs]            (make bench-version; default: 100000 pairs)

Each step runs in its own process. Candidates and scores are written without a model, two pairs per question
(tests/support/preference_data.py). The version goes to a temporary git repository and S3 server. Reading back downloads
the pairs and compares them with themselves as `clincot data diff` does, which keeps a few numbers of each pair in
memory. No step, including its git and dvc commands, may use more than 1000 MB; the exit code is 0 if this holds.
"""

from __future__ import annotations

import argparse
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=int, nargs="?", default=100_000, help="Number of pairs (default: 100000).")
    pairs = parser.parse_args().pairs
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
        print(f"input of {pairs:,} pairs: {size / 1e6:.0f} MB written in {time.perf_counter() - started:.0f} s")
        for name in STEPS:
            worst = max(worst, run_in_process(name, Path(scratch)))
    print(f"peak memory: {worst:.0f} MB (allowed: {ALLOWED_MB:.0f})")
    return int(worst > ALLOWED_MB)


def run_in_process(step: str, scratch: Path) -> float:
    """Run a step in its own process; returns the peak resident memory (MB) of it or of its largest command."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.version_memory", "--step", step, str(scratch)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    own, children = (float(part) for part in done.stdout.split()[-2:])
    print(
        f"{step:>8}: {own:6.0f} MB, its git and dvc commands {children:5.0f} MB, {time.perf_counter() - started:.0f} s"
    )
    return max(own, children)


def make_benchmark_pairs(scratch: Path) -> None:
    """Build the pairs from candidates and scores."""
    from tests.support.preference_data import make_pairs_of

    make_pairs_of(scratch / "round")


def commit_version(scratch: Path) -> None:
    """Commit the pairs as version 1 of a new repository."""
    from clincot.config import VersionConfig
    from clincot.preferences.versions.init import init_repository
    from clincot.stages.runner import run_stage
    from tests.support.preference_data import paths_in

    init_repository(str(scratch / "data.git"), f"s3://{BUCKET}/rounds")
    config = VersionConfig(repository=str(scratch / "data.git"))
    run_stage("version", config, paths_in(scratch / "round"), {"version": scratch / "round" / "version.json"})


def read_back(scratch: Path) -> None:
    """Read version 1 and compare it with itself."""
    from clincot.config import VersionConfig
    from clincot.preferences.versions.version_history import diff_versions

    config = VersionConfig(repository=str(scratch / "data.git"))
    _, version, difference = diff_versions(config, "1", "1", scratch / "read")
    assert difference.unchanged == version.pairs > 0
    print(f"{version.pairs:,} pairs read back", file=sys.stderr)


STEPS: dict[str, Callable[[Path], None]] = {"pair": make_benchmark_pairs, "version": commit_version, "read": read_back}


def run_step(name: str, scratch: Path) -> int:
    """Run a step in this process and print the peak memory (MB) of it and of its commands."""
    STEPS[name](scratch)
    peaks = (resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(*peaks)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_step(sys.argv[2], Path(sys.argv[3])) if sys.argv[1:2] == ["--step"] else main())
