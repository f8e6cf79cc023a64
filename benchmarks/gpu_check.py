"""What a machine with one GPU and no network shows: the models of a 7B recipe through every step that needs a GPU.

    python -m benchmarks.gpu_check [--shape 7b | tiny] [--json PATH]        (make gpu-check; make gpu-check SHAPE=tiny)

Two random models with the shapes of LLaVA-1.5-7B and Qwen2.5-VL-7B (config.json of llava-hf/llava-1.5-7b-hf and
Qwen/Qwen2.5-VL-7B-Instruct) are built on the machine, with the tokenizers of tests/support/families.py. Each

1. answers from the regions of some questions, with shared beginnings and as transformers' own `generate`;
2. judges the answers, both ways;
3. trains LoRA margin-DPO for some steps, and TRL's own DPOTrainer on the same pairs;
4. is merged, loaded again, and answers.

The table has tokens a second, the share of the GPU's peak, and the peak memory. Weights are bfloat16 on a GPU that
computes in it. `tiny` runs the same script on a processor in a minute, so that it can be tested where no GPU is.

What has to be carried: this repository with tests/, and an environment with torch's CUDA build, torchvision and the
packages of requirements-cuda.txt without vLLM (trl, transformers, peft, datasets, accelerate, pydantic, typer, PyYAML,
tenacity, psutil, safetensors, scipy, pillow, tqdm, httpx). No weights, data or network; 35 GB of disk for the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.inference_ways import UNSHARED
from clincot.config import TrainConfig
from clincot.generation.grounders import draw_random_square
from clincot.models.features import clear_feature_caches
from clincot.models.inspection import read_model_config
from clincot.models.precision import choose_device, choose_dtype
from clincot.models.vlm import VisionLanguageModel
from clincot.planning.gpu_table import read_gpus
from clincot.planning.model_sizes import ModelSize, measure_model
from clincot.planning.prompt_counters import CountedPrompt, EncodedPrompts
from clincot.prompts import ChainStep, Conversation, PromptFormat, chain_prompt, judge_prompt, load_prompt_format
from clincot.records import Study
from clincot.text import markdown_table
from clincot.training.margin_dpo import train_on_pairs
from tests.support import families
from tests.support.stock_dpo import train_stock_dpo
from tests.support.training_builders import build_studies, differing_crops, shared_images

QUESTIONS = ("Is there a nodule in the left lung?", "Is the heart enlarged?")
NEW_TOKENS = 16


@dataclass(frozen=True)
class CheckShape:
    """Sizes of the check. questions: of two each about as many images; regions: of each question."""

    llava_text: dict[str, Any]
    llava_vision: dict[str, Any]
    qwen_text: dict[str, Any]
    qwen_vision: dict[str, Any]
    image_px: int
    images: int
    regions: int
    pairs: int


SHAPES = {
    "7b": CheckShape(
        llava_text={
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "vocab_size": 32064,
        },
        llava_vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        qwen_text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 152064,
        },
        qwen_vision={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
        },
        image_px=336,
        images=8,
        regions=7,
        pairs=8,
    ),
    "tiny": CheckShape(
        llava_text={},
        llava_vision={},
        qwen_text={},
        qwen_vision={},
        image_px=32,
        images=2,
        regions=3,
        pairs=2,
    ),
}


@dataclass(frozen=True)
class CheckedStep:
    """One step of one model. tokens: of prompts and replies, or of training sequences; peak_gb: of the GPU."""

    model: str
    step: str
    seconds: float
    tokens: int
    peak_share: float | None  # of the GPU's peak; None: not known
    peak_gb: float | None


class StepTimer:
    """Times steps, and counts the memory of the GPU meanwhile."""

    def __init__(self, model: str, size: ModelSize) -> None:
        self.model, self.size = model, size
        self.steps: list[CheckedStep] = []

    def run_step(self, step: str, run: Callable[[], int], *, passes: float = 1.0) -> None:
        """Run a step that returns how many tokens it computed. passes: forward passes that a token costs."""
        on_gpu = torch.cuda.is_available()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        tokens = run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak_gb = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
        peak = find_peak_operations()
        share = None if peak is None else passes * 2 * tokens * self.size.body / seconds / peak
        self.steps.append(CheckedStep(self.model, step, seconds, tokens, share, peak_gb))


def find_peak_operations() -> float | None:
    """Operations a second of this GPU by the table of `clincot plan`; None for one that is not in it."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    for known, gpu in read_gpus().items():
        if known.split()[0] in name:
            return gpu.operations
    return None


def build_llava(folder: Path, shape: CheckShape) -> None:
    """A random model with the shape of LLaVA-1.5-7B."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = families.build_llama_tokenizer("<image>")
    vision = {**families.get_clip_config(), **shape.llava_vision}
    config = LlavaConfig(
        vision_config=vision,
        text_config=families.get_text_config(tokenizer, "llama", **shape.llava_text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    side = vision["image_size"]
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=families.VICUNA,
        image_token="<image>",
    )
    save_random_model(folder, LlavaForConditionalGeneration, config, processor, [tokenizer.eos_token_id])


def build_qwen(folder: Path, shape: CheckShape) -> None:
    """A random model with the shape of Qwen2.5-VL-7B."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    if not shape.qwen_vision:
        families.build_qwen2_5_vl(folder)
        return
    tokenizer = families.build_qwen_tokenizer(*families.QWEN_WORDS)
    text = families.get_text_config(
        tokenizer,
        "qwen2_5_vl_text",
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        **shape.qwen_text,
    )
    config = Qwen2_5_VLConfig(vision_config=shape.qwen_vision, text_config=text, **families.get_qwen_ids(tokenizer))
    image, video = families.build_qwen_processors(14, most_patches=24 * 24)
    processor = Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=families.QWEN_VL)
    save_random_model(folder, Qwen2_5_VLForConditionalGeneration, config, processor, [tokenizer.eos_token_id])


def save_random_model(folder: Path, kind: Any, config: Any, processor: Any, end_ids: list[int]) -> None:
    """Draw the weights on the device, in the type in which they are loaded, and save them."""
    device = choose_device()
    dtype = getattr(torch, choose_dtype("auto", device))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = end_ids
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


MODELS: dict[str, Callable[[Path, CheckShape], None]] = {"llava": build_llava, "qwen2.5-vl": build_qwen}


def check_model(name: str, work: Path, shape: CheckShape) -> list[CheckedStep]:
    """Build a model and run all steps with it."""
    checkpoint = work / name
    MODELS[name](checkpoint, shape)
    images = work / f"{name}-images"
    studies = build_studies(images, max(shape.images, shape.pairs))
    trained, stock = work / f"{name}-trained", work / f"{name}-trl"
    views = load_prompt_format(checkpoint)
    timer = StepTimer(name, measure_model(read_model_config(str(checkpoint))))
    asked = ask_regions(views, studies[: shape.images], images, shape.regions)
    check_inference(timer, checkpoint, asked, ask_judge(views, studies[: shape.images], images, shape.regions))
    config = TrainConfig(lora_r=8, lora_alpha=16, batch_size=2, epochs=1, train_projector=False, nll_weight=0.0)
    rows = differing_crops(studies[: shape.pairs], images, views)
    tokens = count_training_tokens(checkpoint, rows)
    timer.run_step("LoRA margin-DPO", lambda: train(checkpoint, trained, rows, config, tokens), passes=3)
    same = shared_images(studies[: shape.pairs], images, views)
    timer.run_step("LoRA DPO, stock TRL", lambda: train_stock(checkpoint, stock, same, config, tokens), passes=3)
    merged = VisionLanguageModel(trained, device=choose_device(), dtype=choose_dtype("auto", choose_device()))
    timer.run_step("answers, merged", partial(answer, merged, asked, whole=False))
    for folder in (checkpoint, trained, stock):
        shutil.rmtree(folder, ignore_errors=True)
    return timer.steps


def check_inference(
    timer: StepTimer, checkpoint: Path, asked: Sequence[Conversation], candidates: Sequence[Conversation]
) -> None:
    """Answers and scores, with shared beginnings and each conversation as a whole."""
    device = choose_device()
    model = VisionLanguageModel(checkpoint, device=device, dtype=choose_dtype("auto", device))
    for name, whole in (("shared", False), ("plain", True)):
        timer.run_step(f"answers, {name}", partial(answer, model, asked, whole=whole))
    for name, whole in (("shared", False), ("plain", True)):
        timer.run_step(f"judging, {name}", partial(judge, model, candidates, whole=whole))


def ask_regions(views: PromptFormat, studies: Sequence[Study], folder: Path, regions: int) -> list[Conversation]:
    boxes = [draw_random_square(n, 0.4) for n in range(regions)]
    return [
        chain_prompt(study, folder, views, [ChainStep(question, box, False)])
        for study, question, box in product(studies, QUESTIONS, boxes)
    ]


def ask_judge(views: PromptFormat, studies: Sequence[Study], folder: Path, regions: int) -> list[Conversation]:
    boxes = [draw_random_square(n, 0.4) for n in range(regions)]
    return [
        judge_prompt(study, folder, views, question=QUESTIONS[0], answer=answer, box=box)
        for study, box, answer in product(studies, boxes, ("yes", "no"))
    ]


def answer(model: VisionLanguageModel, asked: Sequence[Conversation], *, whole: bool) -> int:
    """Tokens of prompts and replies, whether they are computed or shared."""
    set_sharing(model, whole=whole)
    replies = model.generate(asked, max_new_tokens=NEW_TOKENS, temperature=0.0, seeds=[0] * len(asked))
    return sum((reply.prompt_tokens or 0) + len(reply.token_logprobs) for reply in replies)


def judge(model: VisionLanguageModel, asked: Sequence[Conversation], *, whole: bool) -> int:
    set_sharing(model, whole=whole)
    before = model.work.prompt_tokens
    model.p_yes(asked)
    return model.work.prompt_tokens - before


def set_sharing(model: VisionLanguageModel, *, whole: bool) -> None:
    clear_feature_caches()
    model.shares_features, model.unshared_reason = not whole, UNSHARED if whole else ""


def count_training_tokens(checkpoint: Path, rows: Sequence[Any]) -> int:
    """Tokens of both sides of all pairs."""
    counter = EncodedPrompts(checkpoint)
    sequences: list[CountedPrompt] = []
    for row in rows:
        sequences += counter.count_row([row.chosen, row.rejected], packed=False)
    return sum(sequence.tokens for sequence in sequences)


def train(checkpoint: Path, out: Path, rows: Sequence[Any], config: TrainConfig, tokens: int) -> int:
    train_on_pairs(rows, checkpoint, out, config, progress=False)
    return tokens


def train_stock(checkpoint: Path, out: Path, rows: Sequence[Any], config: TrainConfig, tokens: int) -> int:
    train_stock_dpo(list(rows), checkpoint, config, out)
    return tokens


def render_steps(steps: Sequence[CheckedStep]) -> str:
    rows = []
    for step in steps:
        share = "" if step.peak_share is None else f"{step.peak_share:.1%}"
        memory = "" if step.peak_gb is None else f"{step.peak_gb:.1f}"
        rows.append((step.model, step.step, f"{step.seconds:.1f}", f"{step.tokens / step.seconds:,.0f}", share, memory))
    return markdown_table(("model", "step", "seconds", "tokens a second", "of the peak", "peak GB"), rows)


def main() -> None:
    """Print the table; --json writes the steps."""
    parser = argparse.ArgumentParser(description="Check a machine with one GPU and no network.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.shape == "7b" and not torch.cuda.is_available():
        parser.error("the shape 7b needs a GPU; --shape tiny runs on a processor")
    steps: list[CheckedStep] = []
    with tempfile.TemporaryDirectory() as work:
        for name in MODELS:
            steps += check_model(name, Path(work), SHAPES[arguments.shape])
    print(render_steps(steps))
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(step) for step in steps], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
