"""Hit-rate of the grounders: how often a grounder's first region shows the finding, on one core.

    python -m benchmarks.relevance [--policy FOLDER] [--images N]

Renders radiographs of patients that no training uses and asks every question whose answer has boxes. The first region
of each grounder, as the crop that the policy would see, is compared with random squares of the same size: a grounder
should have a higher hit-rate than these. Intervals (95 %) are clustered by patient. Run it again after training a new
policy; clincot/generation/grounders.py quotes the latest results.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm import tqdm

from clincot.config import ProposeConfig
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.evaluation.grounding import hits_reference
from clincot.evaluation.intervals import cluster_bootstrap
from clincot.generation.grounders import (
    RelevanceGrounder,
    WindowGrounder,
    WrittenGrounder,
    derive_seed,
    draw_random_square,
)
from clincot.generation.regions import build_grounding_query
from clincot.geometry import WHOLE_IMAGE, Box, crop_square
from clincot.models.load import load_policy
from clincot.models.protocols import Grounder
from clincot.models.vlm import VisionLanguageModel
from clincot.records import Question, Study
from clincot.synthetic.build import build_synthetic_dataset

PATIENTS = range(300, 306)
DRAWS = 20  # random squares per question


def build_grounders(policy: VisionLanguageModel, config: ProposeConfig) -> dict[str, Grounder]:
    """Build the grounders to compare, by the name that the table shows."""
    return {
        "relevance": RelevanceGrounder(policy, quantile=config.relevance_quantile),
        "its tiles only": WindowGrounder(policy, sides=[policy.views.min_crop], stride=1.0),
        "windows": WindowGrounder(policy, sides=config.window_sides, stride=config.window_stride),
        "written": WrittenGrounder(policy, samples=1, temperature=0.0, seed=0),
    }


def find_first_regions(
    grounder: Grounder, questions: list[Question], studies: StudyIndex, folder: Path, config: ProposeConfig
) -> Iterator[Box | None]:
    """Yield the best region of each question, or None if there is none; questions must be grouped by study."""
    for study_id, group in tqdm(groupby(questions, key=lambda q: q.study), desc=grounder.name, unit=" images"):
        queries = [build_grounding_query(question, studies[study_id], limit=config.hypotheses) for question in group]
        for regions in grounder.ground(queries, folder):
            yield regions[0].box if regions else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=Path("assets/policy"), help="Checkpoint of the policy.")
    parser.add_argument("--images", type=int, default=60, help="Number of radiographs.")
    parser.add_argument("--only", action="append", default=[], help="Measure only this grounder; may be repeated.")
    args = parser.parse_args()
    policy, config = load_policy(args.policy), ProposeConfig()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        build_synthetic_dataset(
            folder, warp_seeds=PATIENTS, images=args.images, questions_per_image=3, seed=0, split="bench"
        )
        studies, key = StudyIndex(folder), {r.question: r.boxes for r in load_references(folder)}
        questions = [q for q in load_questions(folder) if key[q.id]]
        patients = [studies[q.study].patient for q in questions]
        print(f"{len(questions)} questions, {len(set(patients))} patients, policy {policy.digest[:12]}")
        print("| grounder | hit-rate | random squares of its size | images/s |\n|---|---|---|---|")
        for name, grounder in build_grounders(policy, config).items():
            if args.only and name not in args.only:
                continue
            started = time.perf_counter()
            boxes = list(find_first_regions(grounder, questions, studies, folder, config))
            rate = len({q.study for q in questions}) / (time.perf_counter() - started)
            hits, random_hits = [], []
            for question, box in zip(questions, boxes, strict=True):
                crop = _crop_box(box or WHOLE_IMAGE, studies[question.study], policy)
                hits.append(float(box is not None and bool(hits_reference(crop, key[question.id]))))
                side = min(1.0, crop.area**0.5)
                draws = [draw_random_square(derive_seed(question.id, n), side) for n in range(DRAWS)]
                random_hits.append(sum(bool(hits_reference(draw, key[question.id])) for draw in draws) / DRAWS)
            intervals = [cluster_bootstrap(values, patients, seed=0) for values in (hits, random_hits)]
            cells = " | ".join(f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in intervals)
            print(f"| {name} | {cells} | {rate:.2f} |", flush=True)


def _crop_box(box: Box, study: Study, policy: VisionLanguageModel) -> Box:
    """Return the part of the image that the policy sees as the crop of a box."""
    if box == WHOLE_IMAGE:
        return box
    return crop_square(box, min_side=policy.views.min_crop, aspect=study.width / study.height)


if __name__ == "__main__":
    main()
