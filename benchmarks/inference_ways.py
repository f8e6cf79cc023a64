"""Several ways to compute the same conversations, and the least that they can cost: for generation.py and judging.py.

- `one by one`: UV-CoT's procedure (arXiv 2504.18397; its scripts ask the model once for every region and candidate):
  a batch of one, with the pictures' pixels in every conversation.
- `batches of 8`: transformers' own `generate` and forward method on padded batches, pixels in every conversation.
- `ours`: what the stages call.
- `floor`: every distinct picture through the tower, every distinct token of the prompts through the language model and
  every token that is written through a decoding step, once each, at the rate of a large batch measured in this run.

Seconds are processor seconds; run it on one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import DynamicCache

from clincot.models.encoding import pad_rows
from clincot.models.features import clear_feature_caches
from clincot.models.prefix_tree import build_keys, build_trees
from clincot.models.vlm import VisionLanguageModel
from clincot.models.work_count import WorkCount
from clincot.prompts import Conversation, collect_views
from clincot.text import markdown_table

T = TypeVar("T")

UNSHARED = "compared with shared beginnings"
_RATE_ROWS = 64  # rows of the batches by which the floor's rates are measured


@dataclass(frozen=True)
class MeasuredWay:
    """What one way cost. seconds: of the processor; peak_mb: the process's largest memory meanwhile."""

    name: str
    seconds: float
    work: WorkCount
    peak_mb: float


@dataclass(frozen=True)
class Floor:
    """Distinct pictures, prompt tokens and written tokens, and what they cost at the rate of large batches."""

    pictures: int
    prompt_tokens: int
    decode_tokens: int
    seconds: float


def load_unshared(checkpoint: Path, batch_size: int) -> VisionLanguageModel:
    """The model with pixels in every conversation and every conversation computed as a whole."""
    model = VisionLanguageModel(checkpoint, batch_size=batch_size)
    model.shares_features, model.unshared_reason = False, UNSHARED
    return model


def load_ways(checkpoint: Path) -> dict[str, VisionLanguageModel]:
    """The model of each way, ours last."""
    return {
        "one by one": load_unshared(checkpoint, 1),
        "batches of 8": load_unshared(checkpoint, 8),
        "ours": VisionLanguageModel(checkpoint),
    }


def measure_way(
    name: str, model: VisionLanguageModel, run: Callable[[VisionLanguageModel], T]
) -> tuple[MeasuredWay, T]:
    """Run one way, without features from before."""
    clear_feature_caches()
    _forget_pictures(model)
    _reset_peak()
    before = replace(model.work)
    started = time.process_time()
    result = run(model)
    seconds = time.process_time() - started
    done = {key: value - getattr(before, key) for key, value in vars(model.work).items()}
    return MeasuredWay(name, seconds, WorkCount(**done), read_peak_mb()), result


def _reset_peak() -> None:
    """Let Linux count the largest memory of this process anew (man 5 proc, clear_refs)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def read_peak_mb() -> float:
    """The largest memory of this process since it was last counted anew."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _forget_pictures(model: VisionLanguageModel) -> None:
    """Forget what the encoder keeps of pictures and texts, so that every way reads them itself."""
    for name in ("_pictures", "_encode_row", "_template", "_count_text_tokens"):
        getattr(model.encoder, name).cache_clear()


def measure_floor(model: VisionLanguageModel, asked: Sequence[Conversation], *, decode_tokens: int) -> Floor:
    """The least that these conversations cost: each distinct part once, in large batches."""
    encoded = [model.encoder.encode(conversation, reply=True) for conversation in asked]
    views = {}
    for conversation in asked:
        views.update({view.key: view for view in collect_views(conversation)})
    trees = build_trees(build_keys(encoded, model.encoder.image_ids), max_tokens=1 << 30)
    tokens = sum(len(tree) for tree in trees)
    longest = sorted(encoded, key=lambda one: len(one.ids))[-_RATE_ROWS:]
    length = len(longest[0].ids)
    seconds = len(views) * _time_pictures(model, list(views.values())[:_RATE_ROWS])
    seconds += tokens * _time_prompt_token(model, rows=min(_RATE_ROWS, max(1, 8192 // length)), length=length)
    if decode_tokens:
        seconds += decode_tokens * _time_decoded_token(model, rows=_RATE_ROWS, length=length)
    return Floor(len(views), tokens, decode_tokens, seconds)


def _time_pictures(model: VisionLanguageModel, views: Sequence[Any]) -> float:
    """Seconds of a picture in the tower, pixels included that are read beforehand."""
    tensors = [model.encoder.encode_pictures([view]).tensors for view in views]
    features = model._features
    missing = dict(zip([view.key for view in views], views, strict=True))
    return _time_call(lambda: features._encode_tensors(tensors, missing)) / len(views)


def _time_prompt_token(model: VisionLanguageModel, *, rows: int, length: int) -> float:
    """Seconds of a token of a prompt in the language model, in a batch without padding."""
    ids_BT = _draw_ids(model, rows, length)
    return _time_call(lambda: model.model.model(input_ids=ids_BT, use_cache=False)) / ids_BT.numel()


def _time_decoded_token(model: VisionLanguageModel, *, rows: int, length: int, steps: int = 4) -> float:
    """Seconds of a written token in a batch of `rows`, after prompts of `length`."""
    ids_BT = _draw_ids(model, rows, length)
    cache = DynamicCache()
    with torch.inference_mode():
        model.model.model(input_ids=ids_BT, past_key_values=cache, use_cache=True)

    def write() -> None:
        for _ in range(steps):
            model.model(input_ids=ids_BT[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-steps)

    return _time_call(write) / (rows * steps)


def _draw_ids(model: VisionLanguageModel, rows: int, length: int) -> torch.Tensor:
    """Words without a picture."""
    word = model.yes_no_ids[0][0]
    return pad_rows([[word] * length] * rows, word, side="right")


def _time_call(call: Callable[[], object], repeats: int = 3) -> float:
    """Processor seconds of the quickest of some calls, after one that warms up."""
    with torch.inference_mode():
        call()
        best = float("inf")
        for _ in range(repeats):
            started = time.process_time()
            call()
            best = min(best, time.process_time() - started)
    return best


def render_ways(figures: dict[str, Any]) -> str:
    """One table of all models and ways."""
    rows = []
    for model, measured in figures.items():
        for name, way in measured["ways"].items():
            memory = f"{way['peak_mb']:,}" if "peak_mb" in way else ""
            rows.append(
                (
                    model,
                    name,
                    f"{way['seconds']:.2f}",
                    f"{way['times_ours']:.2f}",
                    f"{way['encodes']:,}",
                    f"{way['prefill_tokens']:,}",
                    f"{way['decode_tokens']:,}",
                    memory,
                )
            )
    head = ("model", "way", "seconds", "times ours", "pictures", "prompt tokens", "decoded", "peak MB")
    return markdown_table(head, rows)


def run_comparison(description: str, measure: Callable[..., dict[str, Any]]) -> None:
    """The command line of generation.py and judging.py: print the table; --json writes the figures.

    measure: called with a scratch folder, the folder of the questions, their number and `wide`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--data", type=Path, help="A folder that `clincot render` wrote.")
    parser.add_argument("--no-wide", action="store_true", help="Leave out the model of 38 million parameters.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = arguments.data or work / "data"
        figures = measure(work, data, arguments.questions, wide=not arguments.no_wide)
    print(render_ways(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def describe_ways(ways: Sequence[MeasuredWay], floor: Floor) -> dict[str, Any]:
    """Figures of all ways for the JSON report; ratios are of seconds, to ours and to the floor."""
    ours = ways[-1]
    rows: dict[str, Any] = {}
    for way in ways:
        rows[way.name] = {
            "seconds": round(way.seconds, 3),
            "times_ours": round(way.seconds / ours.seconds, 2),
            "encodes": way.work.encodes,
            "prefill_tokens": way.work.prefill_tokens,
            "decode_tokens": way.work.decode_tokens,
            "peak_mb": round(way.peak_mb),
        }
    rows["floor"] = {
        "seconds": round(floor.seconds, 3),
        "times_ours": round(floor.seconds / ours.seconds, 2),
        "encodes": floor.pictures,
        "prefill_tokens": floor.prompt_tokens,
        "decode_tokens": floor.decode_tokens,
    }
    rows["ours"]["times_floor"] = round(ours.seconds / floor.seconds, 2)
    return rows
