"""Original LLaVA layouts become Hugging Face's Llava: same tokens, same logits; what cannot is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clincot.cli.app import main
from clincot.jsonl import hash_files
from clincot.models.checkpoint import UnsupportedCheckpoint, hash_checkpoint
from clincot.models.conversion.convert import ConversionRecord, convert_checkpoint
from clincot.models.conversion.original_families import FAMILIES
from clincot.models.conversion.vision_tower import read_vision_tower
from clincot.models.conversion.weights import group_by_size, plan_original_weights
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import Conversation, ImageView, Turn
from tests.support.families import build_llama_tokenizer
from tests.support.original_llava import (
    IMAGE_TOKEN_INDEX,
    Message,
    OriginalLlava,
    write_original,
    write_sentencepiece_model,
    write_tower,
)

TOLERANCE = 1e-4
NAMES = ["llava-med", "huatuogpt-vision"]
PATCHES = 16  # 32 px in patches of 8 px
QUESTION = "Is there a nodule in the left lung? Answer yes or no."


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / "clip"
    write_tower(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A wide and a high picture: padding and cropping to a square give different pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for number, shape in enumerate([(50, 91, 3), (80, 33, 3)]):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module", params=NAMES)
def converted(request: pytest.FixtureRequest, tower: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(the original's reading, the converted model)."""
    folder = tmp_path_factory.mktemp(request.param)
    write_original(folder / "original", request.param, shards=3)
    convert_checkpoint(folder / "original", folder / "out", FAMILIES[request.param], vision_tower=tower)
    return OriginalLlava(folder / "original"), VisionLanguageModel(folder / "out")


def make_turns(*turns: tuple[str, str, list[Path]]) -> tuple[list[Message], Conversation]:
    """The same conversation for the original and for the product."""
    messages, product = [], []
    for role, text, paths in turns:
        messages.append(Message(role, text, [Image.open(path).convert("RGB") for path in paths]))
        views = tuple(ImageView(str(path), hash_files(path)) for path in paths)
        product.append(Turn("user" if role == "user" else "assistant", text, views))
    return messages, tuple(product)


def compare(original: OriginalLlava, model: VisionLanguageModel, *turns: tuple[str, str, list[Path]]) -> None:
    """The same ids with every -200 as one token a patch, and the same logits over the original's vocabulary."""
    messages, conversation = make_turns(*turns)
    ids, expected_TV = original.compute_logits(messages)
    image_id = model.model.config.image_token_index
    spliced: list[int] = []
    for token in ids:
        spliced += [image_id] * PATCHES if token == IMAGE_TOKEN_INDEX else [token]
    encoded = model.encoder.encode(conversation, reply=True)
    assert list(encoded.ids) == spliced
    with torch.inference_mode():
        logits_TV = model.model(**model._build_inputs([encoded], side="right")).logits[0]
    assert (logits_TV[:, : expected_TV.shape[1]] - expected_TV).abs().max() < TOLERANCE
    assert expected_TV.std(0).mean() > 0.05  # positions differ, or the comparison could not fail


def test_logits_with_one_picture(converted: tuple[Any, Any], pictures: list[Path]) -> None:
    compare(*converted, ("user", QUESTION, pictures[:1]))
    compare(*converted, ("user", QUESTION, pictures[1:]))


def test_logits_of_a_second_turn_with_its_own_picture(converted: tuple[Any, Any], pictures: list[Path]) -> None:
    compare(
        *converted,
        ("user", "Which zone is the nodule in?", pictures[:1]),
        ("assistant", "[12, 30, 45, 78]", []),
        ("user", QUESTION, pictures[1:]),
    )


def test_a_trained_turn_ends_with_the_end_token(converted: tuple[Any, Any], pictures: list[Path]) -> None:
    """Also where the format has none (HuatuoGPT-Vision), so that training teaches the model to stop."""
    _, model = converted
    _, conversation = make_turns(("user", QUESTION, pictures[:1]))
    encoded = model.encoder.encode((*conversation, Turn("assistant", "yes", action=True)))
    written = [token for token, action in zip(encoded.ids, encoded.actions, strict=True) if action]
    assert written[-1] == model.encoder.tokenizer.eos_token_id
    assert model.encoder.tokenizer.decode(written, skip_special_tokens=True).strip() == "yes"
    asked = model.encoder.encode(conversation, reply=True).ids
    assert encoded.ids[: len(asked)] == asked


def test_the_picture_matters(converted: tuple[Any, Any], pictures: list[Path]) -> None:
    """Otherwise equal logits would say nothing of the tower and the projector."""
    original, _ = converted
    rows = [original.compute_logits(make_turns(("user", QUESTION, [path]))[0])[1][-1] for path in pictures]
    assert (rows[0] - rows[1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    "changed",
    [
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.1.mlp.fc2.weight",
        "language_model.model.layers.0.self_attn.k_proj.weight",
    ],
)
def test_one_wrong_weight_shows(tmp_path: Path, tower: Path, pictures: list[Path], family: str, changed: str) -> None:
    write_original(tmp_path / "original", family)
    convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES[family], vision_tower=tower)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    torch.manual_seed(0)
    tensors[changed] = tensors[changed] + 0.1 * torch.randn_like(tensors[changed])
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError):
        compare(
            OriginalLlava(tmp_path / "original"),
            VisionLanguageModel(tmp_path / "out"),
            ("user", QUESTION, pictures[:1]),
        )


def test_tower_from_its_own_folder(tmp_path: Path, tower: Path, pictures: list[Path]) -> None:
    write_original(tmp_path / "original", "llava-med", tower_weights=False)
    record = convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)
    assert record.vision_tower_sha256 is not None
    compare(
        OriginalLlava(tmp_path / "original", tower),
        VisionLanguageModel(tmp_path / "out"),
        ("user", QUESTION, pictures[:1]),
    )


def test_tower_config_from_a_folder_in_the_original(tmp_path: Path, pictures: list[Path]) -> None:
    """HuatuoGPT-Vision names a folder of its own, vit/clip_vit_large_patch14_336."""
    config = write_original(tmp_path / "original", "huatuogpt-vision")
    write_tower(tmp_path / "original" / config["mm_vision_tower"], weights=False)
    convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["huatuogpt-vision"])
    compare(
        OriginalLlava(tmp_path / "original"), VisionLanguageModel(tmp_path / "out"), ("user", QUESTION, pictures[:1])
    )


def test_pictures_that_are_not_padded(tmp_path: Path, tower: Path, pictures: list[Path]) -> None:
    write_original(tmp_path / "original", "llava-med", image_aspect_ratio="square")
    convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)
    compare(
        OriginalLlava(tmp_path / "original"), VisionLanguageModel(tmp_path / "out"), ("user", QUESTION, pictures[:1])
    )


@pytest.mark.parametrize("family", NAMES)
def test_tied_embeddings(tmp_path: Path, tower: Path, pictures: list[Path], family: str) -> None:
    write_original(tmp_path / "original", family, tie_word_embeddings=True)
    convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES[family], vision_tower=tower)
    compare(
        OriginalLlava(tmp_path / "original"), VisionLanguageModel(tmp_path / "out"), ("user", QUESTION, pictures[:1])
    )


def test_vocabulary_record_and_end_tokens(tmp_path: Path, tower: Path) -> None:
    """The vocabulary grows to a multiple of 64; its new rows are the mean; Qwen2's has room already."""
    config = write_original(tmp_path / "med", "llava-med")
    rows = config["vocab_size"]
    record = convert_checkpoint(tmp_path / "med", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)
    saved = ConversionRecord.model_validate_json((tmp_path / "out" / "conversion.json").read_text())
    assert saved == record
    assert (record.image_token_id, record.source_vocabulary, record.vocabulary % 64) == (rows, rows, 0)
    assert record.source_sha256 == hash_checkpoint(tmp_path / "med")
    assert record.vision_tower_sha256 is None
    original = load_file(tmp_path / "med" / "model.safetensors")
    out = load_file(tmp_path / "out" / "model.safetensors")
    for old, new in (("model.embed_tokens.weight", "model.embed_tokens.weight"), ("lm_head.weight", "lm_head.weight")):
        weight = out[f"language_model.{new}"]
        assert torch.equal(weight[:rows], original[old])
        assert torch.allclose(weight[rows:], original[old].mean(0).expand(record.vocabulary - rows, -1), atol=1e-6)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_parameters"]["rope_theta"] == config["rope_theta"]
    assert (text["rms_norm_eps"], text["sliding_window"]) == (config["rms_norm_eps"], None)
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ends["eos_token_id"] == config["eos_token_id"]
    assert "temperature" not in ends
    config = write_original(tmp_path / "huatuo", "huatuogpt-vision")
    family = FAMILIES["huatuogpt-vision"]
    record = convert_checkpoint(tmp_path / "huatuo", tmp_path / "out-2", family, vision_tower=tower)
    assert record.vocabulary == record.source_vocabulary == config["vocab_size"]


def test_dtype_and_bytes_are_kept_in_groups_of_bounded_size(tmp_path: Path, tower: Path) -> None:
    write_original(tmp_path / "original", "huatuogpt-vision", torch_dtype="bfloat16")
    path = tmp_path / "original" / "model.safetensors"
    tensors = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file(tensors, path)
    family, most = FAMILIES["huatuogpt-vision"], 40_000
    convert_checkpoint(tmp_path / "original", tmp_path / "out", family, vision_tower=tower, max_shard_bytes=most)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for file in files:
        shard = load_file(tmp_path / "out" / file)
        assert len(shard) == 1 or sum(value.nbytes for value in shard.values()) <= most
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    shard = load_file(tmp_path / "out" / index["weight_map"][name])
    assert torch.equal(shard[name], tensors["model.layers.1.mlp.up_proj.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_groups_keep_the_order_and_every_tensor(tmp_path: Path) -> None:
    write_original(tmp_path / "original", "llava-med")
    planned, _ = plan_original_weights(tmp_path / "original")
    groups = group_by_size(planned, 10_000)
    assert [one for group in groups for one in group] == planned
    assert group_by_size(planned, 10**9) == [planned]


def test_the_known_tower_needs_no_folder_for_its_config(tmp_path: Path) -> None:
    for name in ("openai/clip-vit-large-patch14-336", "vit/clip_vit_large_patch14_336"):
        tower = read_vision_tower(tmp_path, {"mm_vision_tower": name}, None)
        assert (tower.config.image_size, tower.config.patch_size, tower.config.num_hidden_layers) == (336, 14, 24)
        assert tower.image_processor["size"] == {"shortest_edge": 336}


def test_image_processing_of_the_towers_folder(tmp_path: Path) -> None:
    """Numbers of preprocessor_config.json count, whatever CLIP's own are."""
    write_tower(tmp_path / "tower")
    path = tmp_path / "tower" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.5, 0.4, 0.3]}))
    write_original(tmp_path / "original", "llava-med")
    convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tmp_path / "tower")
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_processor"]
    assert processor["image_mean"] == [0.5, 0.4, 0.3]
    assert (processor["size"], processor["crop_size"]) == ({"shortest_edge": 32}, {"height": 32, "width": 32})
    assert processor["do_pad"] is True


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_llama"}, r'model_type is "llava_llama".*reads "llava_mistral"'),
        ({"mm_projector_type": "linear"}, r'mm_projector_type is "linear".*reads "mlp2x_gelu"'),
        ({"mm_use_im_start_end": True}, r"mm_use_im_start_end is true.*reads false"),
        ({"image_aspect_ratio": "anyres"}, r'image_aspect_ratio is "anyres".*reads "pad" or "square"'),
        ({"mm_vision_select_feature": "cls_patch"}, r'mm_vision_select_feature is "cls_patch"'),
        ({"mm_resampler_type": "perceiver"}, r'mm_resampler_type is "perceiver".*reads none'),
        ({"mm_vision_select_layer": [-2, -5]}, "mm_vision_select_layer is .*expected one layer"),
        ({"mm_vision_tower": None}, "mm_vision_tower is null, expected str"),
        ({"num_hidden_layers": 3}, r"lacks language_model\.model\.layers\.2\..* and 4 more"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..*: the config describes no such weight"),
        ({"intermediate_size": 48}, r"mlp\.\w+\.weight has shape .*, and by the config"),
    ],
)
def test_a_config_that_llava_cannot_express(tmp_path: Path, tower: Path, changes: dict[str, Any], message: str) -> None:
    original = tmp_path / "original"
    config = write_original(original, "llava-med")
    (original / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedCheckpoint, match=message):
        convert_checkpoint(original, tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "the config describes no such weight"),
        ("model.mm_projector.4.weight", "model.mm_projector.4.weight: not a weight of the original layout"),
        ("model.vision_resampler.query", "model.vision_resampler.query: not a weight of the original layout"),
    ],
)
def test_an_unexpected_weight(tmp_path: Path, tower: Path, name: str, message: str) -> None:
    write_original(tmp_path / "original", "llava-med")
    save_file({name: torch.ones(2, 2)}, tmp_path / "original" / "more.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=message):
        convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)


def test_weights_without_effect_are_left_out(tmp_path: Path, tower: Path) -> None:
    write_original(tmp_path / "original", "llava-med")
    names = ["model.image_newline", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "original" / "more.safetensors")
    family = FAMILIES["llava-med"]
    record = convert_checkpoint(tmp_path / "original", tmp_path / "out", family, vision_tower=tower)
    assert list(record.ignored_weights) == names


def test_a_tower_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_original(tmp_path / "original", "llava-med", tower_weights=False)
    assert main(["convert", "llava-med", str(tmp_path / "original"), str(tmp_path / "out")]) == 1
    assert "'openai/clip-vit-large-patch14-336'; name a folder with that model with --vision-tower" in (
        capsys.readouterr().err
    )


def test_a_tower_whose_config_is_unknown(tmp_path: Path) -> None:
    write_original(tmp_path / "original", "llava-med", mm_vision_tower="google/siglip-so400m-patch14-384")
    with pytest.raises(UnsupportedCheckpoint, match="siglip-so400m-patch14-384', whose config is unknown here"):
        convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"])


@pytest.mark.parametrize("where", ["original", "tower"])
def test_a_pickle(tmp_path: Path, where: str) -> None:
    write_tower(tmp_path / "tower")
    write_original(tmp_path / "original", "llava-med", tower_weights=False)
    (tmp_path / where / "model.safetensors").rename(tmp_path / where / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpoint, match=f"{where}: pytorch_model.bin is pickled"):
        convert_checkpoint(
            tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tmp_path / "tower"
        )


def test_a_missing_shard_and_a_damaged_file(tmp_path: Path, tower: Path) -> None:
    write_original(tmp_path / "original", "llava-med", shards=2)
    shard = tmp_path / "original" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(UnsupportedCheckpoint, match=r"00002-of-00002.safetensors: not a whole safetensors file"):
        convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)
    shard.unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"lists model-00002-of-00002\.safetensors, not in the folder"):
        convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)


def test_a_tokenizer_that_reads_pictures_otherwise(tmp_path: Path, tower: Path) -> None:
    """A space in front of the first part only, as new Llama tokenizers have it; the original puts one before each."""
    write_original(tmp_path / "original", "llava-med")
    build_llama_tokenizer(legacy=False, add_bos_token=True).save_pretrained(tmp_path / "original")
    with pytest.raises(
        UnsupportedCheckpoint, match=r'must put a space in front of every part .prepend_scheme "always"'
    ):
        convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)


def test_a_tokenizer_without_bos(tmp_path: Path, tower: Path) -> None:
    write_original(tmp_path / "original", "llava-med")
    build_llama_tokenizer(legacy=True, add_bos_token=False).save_pretrained(tmp_path / "original")
    with pytest.raises(UnsupportedCheckpoint, match=r"its tokenizer does not put <s> in front of a text"):
        convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)


def test_a_sentencepiece_model_without_its_package(
    tmp_path: Path, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    write_original(tmp_path / "original", "llava-med")
    (tmp_path / "original" / "tokenizer.json").rename(tmp_path / "original" / "tokenizer.model")
    with pytest.raises(UnsupportedCheckpoint, match=r"without a tokenizer.json needs SentencePiece: pip install"):
        convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)


def test_a_sentencepiece_model(tmp_path: Path, tower: Path, pictures: list[Path]) -> None:
    """The tokens are SentencePiece's own, a space in front of every part included; needs sentencepiece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    write_original(tmp_path / "original", "llava-med")
    write_sentencepiece_model(tmp_path / "original")
    convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)
    model = VisionLanguageModel(tmp_path / "out")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "original" / "tokenizer.model"))
    image_id = model.model.config.image_token_index
    _, conversation = make_turns(("user", QUESTION, pictures[:1]))
    expected = [1, *pieces.encode("[INST] "), *[image_id] * PATCHES, *pieces.encode(f"\n{QUESTION} [/INST]")]
    assert list(model.encoder.encode(conversation, reply=True).ids) == expected


def test_an_existing_folder_is_left_alone(tmp_path: Path, tower: Path) -> None:
    write_original(tmp_path / "original", "llava-med")
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedCheckpoint, match="exists already"):
        convert_checkpoint(tmp_path / "original", tmp_path / "out", FAMILIES["llava-med"], vision_tower=tower)


@pytest.mark.parametrize("family", NAMES)
def test_the_command_line(tmp_path: Path, tower: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    write_original(tmp_path / "original", family)
    words = [str(tmp_path / "original"), str(tmp_path / "out"), "--vision-tower", str(tower)]
    assert main(["convert", family, *words]) == 0
    assert "LlavaForConditionalGeneration from llava_" in capsys.readouterr().out
    assert main(["convert", family, *words]) == 1
