"""What the speed benchmarks share: rendered questions of development patients, and a wider random model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from clincot.config import find_recipe, resolve_path
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.generation.regions import build_grounders, propose_regions
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import PromptFormat, save_prompt_format
from clincot.records import Question, Region
from clincot.synthetic.build import build_synthetic_dataset
from clincot.synthetic.tiny_model import FRAME_PX, TinyModelSpec, build_tiny_model

POLICY, JUDGE = "shipped:policy", "shipped:judge-a"
PATIENTS = range(500, 502)  # development patients: no result is reported on them
WIDE_GRID = 6  # 36 tiles and a crop of 16 tokens each: some 600 visual tokens


@dataclass(frozen=True)
class AskedRegions:
    """Questions with their images and regions."""

    folder: Path
    questions: list[Question]
    studies: StudyIndex
    regions: list[Region]


def render_questions(folder: Path, count: int, *, per_image: int = 3) -> tuple[list[Question], StudyIndex]:
    """`count` questions about rendered radiographs of development patients; a folder that is there is read again."""
    if not folder.exists():
        images = -(-count // per_image)
        build_synthetic_dataset(
            folder, warp_seeds=PATIENTS, images=images, questions_per_image=per_image, seed=7, split="train"
        )
    return list(islice(load_questions(folder), count)), StudyIndex(folder)


def ask_regions(folder: Path, policy: VisionLanguageModel, count: int) -> AskedRegions:
    """Questions and the regions that the demo's recipe proposes for them."""
    questions, studies = render_questions(folder, count)
    config = find_recipe("small-model").params.propose
    regions = list(propose_regions(questions, studies, folder, build_grounders(config, policy), config))
    return AskedRegions(folder, questions, studies, regions)


def resolve_shipped(name: str) -> Path:
    return Path(resolve_path(name))


def build_wide_model(folder: Path, *, grid: int = WIDE_GRID) -> Path:
    """A random Idefics3 of 38 million parameters that sees an image as grid x grid tiles."""
    spec = TinyModelSpec(vision_hidden=256, vision_layers=6, text_hidden=512, text_layers=8)
    build_tiny_model(folder, spec, ["Is there a nodule in the left lung? upper lower zone", "yes no"])
    whole = PromptFormat(wording="brief", whole_grid=grid, whole_px=FRAME_PX, crop_px=FRAME_PX, min_crop=0.25)
    save_prompt_format(folder, whole)
    return folder
