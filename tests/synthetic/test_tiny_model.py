"""The small checkpoint: real files, the same bytes from the same spec, and a tokenizer to which no text is unknown."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from clincot.models.checkpoint import hash_checkpoint
from clincot.prompts import PromptFormat, load_prompt_format
from clincot.synthetic.tiny_model import TinyModelSpec, build_tokenizer
from tests.support import tiny


def test_the_same_spec_and_corpus_give_the_same_bytes(untrained_dir: Path, tmp_path: Path) -> None:
    again, other = tiny.write_model(tmp_path / "again", seed=0), tiny.write_model(tmp_path / "other", seed=1)
    names = sorted(p.name for p in untrained_dir.iterdir())
    assert sorted(p.name for p in again.iterdir()) == names
    assert [n for n in names if (again / n).read_bytes() != (untrained_dir / n).read_bytes()] == []
    assert hash_checkpoint(again) == hash_checkpoint(untrained_dir) != hash_checkpoint(other)


def test_stock_transformers_loads_the_folder(untrained_dir: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(untrained_dir)
    processor = AutoProcessor.from_pretrained(untrained_dir, backend="pil")
    assert type(model).__name__ == "Idefics3ForConditionalGeneration"
    assert model.get_input_embeddings().weight.shape[0] == len(processor.tokenizer)
    assert processor.chat_template
    assert load_prompt_format(untrained_dir) == PromptFormat(wording="brief", whole_grid=2, whole_px=64, crop_px=64)


def test_the_sizes_hang_together() -> None:
    """64 px in patches of 8 px are 8 x 8; 4 x 4 tokens take 2 x 2 patches each."""
    assert TinyModelSpec().scale_factor == 2
    assert TinyModelSpec(patch_px=16, tokens_per_side=2).scale_factor == 2
    assert TinyModelSpec(patch_px=8, tokens_per_side=8).scale_factor == 1


def anything(seed: int) -> str:
    """Text of any planes of Unicode, half surrogates left out: they are no text."""
    rng = random.Random(seed)
    points = [
        rng.choice([rng.randrange(32, 127), rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000)])
        for _ in range(rng.randrange(1, 60))
    ]
    return "".join(map(chr, points))


TEXTS = [
    "Is there a nodule?",
    "  two  spaces\n\ttabs ",
    "naïve Ödem — 5 µm ≥ 3",
    "肺結節はありますか",
    "🫁👩🏽‍⚕️",
    "é vs é",
    "a , b . c ?",
    "[12, 30, 37, 55]",
    "\u200b\ufeff\x00\x7f",
    *(anything(seed) for seed in range(60)),
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_restores_any_text_without_unknown_tokens(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.unk_token_id not in ids or TOKENIZER.unk_token_id is None
    assert not set(ids) & set(TOKENIZER.all_special_ids)


TOKENIZER = build_tokenizer(tiny.CORPUS, 1024)


def test_every_percentage_of_a_box_is_one_token() -> None:
    """ "[", three times "n" and ",", a last "n", "]": the first number follows the bracket, the others a space."""
    lengths = {len(TOKENIZER(f"[{n}, {n}, {n}, {n}]", add_special_tokens=False)["input_ids"]) for n in range(101)}
    assert lengths == {9}


def test_the_tokenizer_of_the_folder_is_the_one_built(untrained_dir: Path) -> None:
    stored = json.loads((untrained_dir / "tokenizer.json").read_text())
    assert stored["model"]["type"] == "BPE"
    assert "<fake_token_around_image>" in {token["content"] for token in stored["added_tokens"]}
