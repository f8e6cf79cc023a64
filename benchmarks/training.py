"""Training steps: ours against TRL's own DPOTrainer on the same pairs, both sides looking at one crop.

    OMP_NUM_THREADS=1 python -m benchmarks.training [--pairs N] [--epochs N] [--grid N] [--json PATH]

The model is a random Idefics3 of 38 million parameters with a frozen tower; the grid of tiles decides how many visual
tokens it sees (6: some 600, 12: some 2,300). Each way trains in a process of its own, so that its largest memory is
its own. Seconds are processor seconds of the whole training, the reference's pass included, without loading the model.

Ours trains without the probes of the loss's terms: a run has at most one in ten steps, each a little dearer than a
step, and here there are only two steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clincot.text import markdown_table

WAYS = ("ours", "TRL")


def run_way(way: str, work: Path, pairs: int, epochs: float) -> dict[str, float]:
    """Train in this process: processor seconds, the largest memory, and the last step's loss."""
    from clincot.config import TrainConfig
    from clincot.prompts import load_prompt_format
    from clincot.training import margin_dpo
    from clincot.training.margin_dpo import train_on_pairs
    from tests.support.stock_dpo import train_stock_dpo
    from tests.support.training_builders import build_studies, shared_images

    margin_dpo.list_probe_steps = lambda steps: frozenset()
    images = work / "images"
    studies = build_studies(images, pairs)
    config = TrainConfig(
        margin_lambda=0.0, nll_weight=0.0, warmup_ratio=0.0, lr=1e-5, batch_size=2, epochs=epochs, full_finetuning=True
    )
    rows = shared_images(studies, images, load_prompt_format(work / "model"))
    started = time.process_time()
    if way == "ours":
        loss = train_on_pairs(rows, work / "model", work / "ours", config, progress=False)["loss"]
    else:
        loss = train_stock_dpo(rows, work / "model", config, work / "trl")[-1]
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(time.process_time() - started, 2), "peak_mb": round(peak_mb), "loss": round(loss, 6)}


def measure_training(work: Path, *, pairs: int, epochs: float, grid: int) -> dict[str, Any]:
    """Figures of both ways."""
    from benchmarks.bench_material import build_wide_model

    build_wide_model(work / "model", grid=grid)
    figures: dict[str, Any] = {"pairs": pairs, "epochs": epochs, "tiles": grid * grid}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.training", "--way", way, str(work), str(pairs), str(epochs)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures[way] = json.loads(done.stdout.splitlines()[-1])
    figures["ratio"] = round(figures["TRL"]["seconds"] / figures["ours"]["seconds"], 2)
    figures["memory_ratio"] = round(figures["ours"]["peak_mb"] / figures["TRL"]["peak_mb"], 2)
    return figures


def render_training(figures: dict[str, Any]) -> str:
    rows = []
    for way in WAYS:
        one = figures[way]
        rows.append((way, f"{one['seconds']:.1f}", f"{one['peak_mb']:,}", f"{one['loss']:.6f}"))
    return markdown_table(("way", "seconds", "peak MB", "loss of the last step"), rows)


def main() -> None:
    """Print the table; --json writes the figures."""
    parser = argparse.ArgumentParser(description="Compare a training with stock TRL.")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--grid", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        figures = measure_training(Path(work), pairs=arguments.pairs, epochs=arguments.epochs, grid=arguments.grid)
    print(render_training(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--way"]:
        way, work, pairs, epochs = sys.argv[2:]
        print(json.dumps(run_way(way, Path(work), int(pairs), float(epochs))))
    else:
        main()
