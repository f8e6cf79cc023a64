"""Checkpoints in the original LLaVA layout, and a reading of them that shares no code with the converter.

`write_original` writes a tiny random checkpoint with the keys and config fields of the published ones. `OriginalLlava`
computes logits from such a folder as the original repositories do: pictures padded to a square, every part of the
prompt between pictures tokenized by itself, picture features spliced into the embeddings at the position of token -200
(microsoft/LLaVA-Med 821e1c7: llava/mm_utils.py, llava/model/llava_arch.py, llava/conversation.py;
FreedomIntelligence/HuatuoGPT-Vision 546b25f: cli.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.support.families import CORPUS, build_llama_tokenizer, build_qwen_tokenizer

IMAGE_TOKEN_INDEX = -200
TOWER_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PREPROCESSOR = {  # the fields of openai/clip-vit-large-patch14-336 at another size; numbers, not mappings, as there
    "crop_size": 32,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "size": 32,
}
TEXT_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,  # neither this nor rope_theta is the classes' default: a field that is lost shows
    "rope_theta": 1000000.0,
    "use_cache": True,
    "torch_dtype": "float32",
}
LLAVA_FIELDS = {
    "freeze_mm_mlp_adapter": False,
    "mm_hidden_size": 24,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
LLAVA_MED = {
    **TEXT_CONFIG,
    **LLAVA_FIELDS,
    "architectures": ["LlavaMistralForCausalLM"],
    "model_type": "llava_mistral",
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": [[336, 672], [672, 336]],  # present, and unused without anyres
    "mm_patch_merge_type": "spatial_unpad",  # likewise
    "sliding_window": None,
    "tie_word_embeddings": False,
}
HUATUO = {
    **TEXT_CONFIG,
    **LLAVA_FIELDS,
    "architectures": ["LlavaQwen2ForCausalLM"],
    "model_type": "llava_qwen2",
    "max_window_layers": 2,
    "mm_vision_tower": "vit/clip_vit_large_patch14_336",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
CONFIGS = {"llava-med": LLAVA_MED, "huatuogpt-vision": HUATUO}


@dataclass(frozen=True)
class Message:
    """A turn as the original prompt functions take it."""

    role: str
    text: str
    images: Sequence[Image.Image] = ()


# --- writing


def write_tower(folder: Path, *, weights: bool = True) -> None:
    """A folder like openai/clip-vit-large-patch14-336, as safetensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": TOWER_CONFIG}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    if weights:
        tensors = {f"vision_model.{name}": value for name, value in draw_tower().items()}
        tensors |= {"logit_scale": torch.tensor(1.0), "text_model.embeddings.token_embedding.weight": torch.ones(2, 2)}
        save_file(tensors, folder / "model.safetensors")


def draw_tower() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = CLIPVisionModel(CLIPVisionConfig(**TOWER_CONFIG)).state_dict()
    return {name.removeprefix("vision_model."): 3 * value for name, value in state.items()}


def write_original(
    folder: Path, family: str, *, tower_weights: bool = True, shards: int = 1, **changes: Any
) -> dict[str, Any]:
    """Write a checkpoint in the original layout; `changes` are fields of its config, which is returned."""
    folder.mkdir(parents=True)
    if family == "llava-med":
        tokenizer = build_llama_tokenizer(legacy=True, add_bos_token=True)
        write_mistral_tokenizer(folder, tokenizer)
    else:
        tokenizer = build_qwen_tokenizer(eos="<|endoftext|>")
        tokenizer.save_pretrained(folder)
    rows = len(tokenizer) + (8 if family == "huatuogpt-vision" else 0)  # Qwen2 has more rows than tokens
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = {**CONFIGS[family], "vocab_size": rows, **ids, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({**ids, "do_sample": True, "temperature": 0.2}))
    tensors = draw_original(config, tower_weights=tower_weights)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return config
    weight_map = {name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors" for n, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


def write_mistral_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The files of mistralai/Mistral-7B-Instruct-v0.2 in shape: a Prepend normalizer, no padding token."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepended = {"type": "Prepend", "prepend": "\u2581"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [prepended, replaced]}
    content["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    fields = {"add_bos_token": True, "add_eos_token": False, "legacy": True, "tokenizer_class": "LlamaTokenizer"}
    fields |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def write_sentencepiece_model(folder: Path) -> None:
    """A tokenizer.model in place of tokenizer.json; the package sentencepiece trains it."""
    trainer = import_module("sentencepiece").SentencePieceTrainer
    with (folder / "tokenizer.model").open("wb") as file:
        trainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            vocab_size=560,
            model_type="bpe",
            byte_fallback=True,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=1,
        )
    (folder / "tokenizer.json").unlink()


def draw_original(config: Mapping[str, Any], *, tower_weights: bool = True) -> dict[str, torch.Tensor]:
    """Random weights under the published names."""
    torch.manual_seed(0)
    state = build_language_model(config).state_dict()  # model.layers.*, model.embed_tokens.*, model.norm.*, lm_head.*
    tensors = {name: (4 * value if value.ndim == 2 else value) for name, value in state.items()}
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight")
    for layer, linear in (("0", nn.Linear(24, 32)), ("2", nn.Linear(32, 32))):
        tensors |= {f"model.mm_projector.{layer}.{name}": 2 * value for name, value in linear.state_dict().items()}
    if tower_weights:
        prefix = "model.vision_tower.vision_tower.vision_model."
        tensors |= {prefix + name: value for name, value in draw_tower().items()}
    return {name: value.detach().clone() for name, value in tensors.items()}


def build_language_model(config: Mapping[str, Any]) -> Any:
    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    if config["model_type"] == "llava_mistral":
        return MistralForCausalLM(MistralConfig(**fields))
    return Qwen2ForCausalLM(Qwen2Config(**fields))


# --- reading


def render_llava_med(messages: Sequence[Message], *, reply: bool) -> str:
    """conv_mistral_instruct of llava/conversation.py: separator style LLAMA_2 with sep "" and sep2 "</s>"."""
    text = ""
    for message in messages:
        if message.role == "user":
            text += f"[INST] {'<image>' + chr(10) if message.images else ''}{message.text} [/INST]"
        else:
            text += " " + message.text + " " + "</s>"
    return text


def render_huatuo(messages: Sequence[Message], *, reply: bool) -> str:
    """preprocess_huatuo of cli.py, before tokenization."""
    text = ""
    for message in messages:
        if message.role == "user":
            asked = ("<image>\n" * len(message.images) + message.text).strip()
            text += f"<|user|>\n{asked}\n"
        else:
            text += f"<|assistant|>\n{message.text} \n"
    return text + ("<|assistant|>\n" if reply else "")


class OriginalLlava:
    """Reads a checkpoint in the original layout, its tower's weights from `tower` if it contains none."""

    def __init__(self, folder: Path, tower: Path | None = None) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(folder, config=build_language_model(self.config).config)
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        self.language_model = build_language_model(self.config)
        tied = {"lm_head.weight": weights["model.embed_tokens.weight"]} if self.config["tie_word_embeddings"] else {}
        is_text = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
        text = {name: value for name, value in weights.items() if name.startswith(is_text)}
        self.language_model.load_state_dict({**text, **tied}, strict=True)
        width = self.config["hidden_size"]
        self.projector = nn.Sequential(nn.Linear(24, width), nn.GELU(), nn.Linear(width, width))
        prefix = "model.mm_projector."
        projector = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        self.projector.load_state_dict(projector, strict=True)
        prefix = "model.vision_tower.vision_tower.vision_model."
        if not any(name.startswith(prefix) for name in weights):
            assert tower is not None
            weights, prefix = load_file(tower / "model.safetensors"), "vision_model."
        vision = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        self.tower = CLIPVisionModel(CLIPVisionConfig(**TOWER_CONFIG))
        nested = "vision_model." if any(n.startswith("vision_model.") for n in self.tower.state_dict()) else ""
        self.tower.load_state_dict({nested + name: value for name, value in vision.items()}, strict=True)
        self.language_model.eval()
        self.tower.eval()
        size = {"shortest_edge": 32}
        self.image_processor = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
        self.pads = self.config["model_type"] == "llava_qwen2" or self.config["image_aspect_ratio"] == "pad"

    def compute_logits(self, messages: Sequence[Message], *, reply: bool = True) -> tuple[list[int], torch.Tensor]:
        """(token ids with one -200 for each picture, logits (T, V) after the pictures are spliced in)."""
        is_med = self.config["model_type"] == "llava_mistral"
        text = (render_llava_med if is_med else render_huatuo)(messages, reply=reply)
        ids = self.tokenize(text)
        images = [image for message in messages for image in message.images]
        with torch.no_grad():
            embeddings_TH = self.splice(torch.tensor(ids), self.encode_images(images))
            logits_TV: torch.Tensor = self.language_model(inputs_embeds=embeddings_TH[None]).logits[0]
        return ids, logits_TV

    def tokenize(self, text: str) -> list[int]:
        """tokenizer_image_token: chunks by themselves, the beginning-of-text token once, -200 between chunks."""
        chunks = [self.tokenizer(chunk).input_ids for chunk in text.split("<image>")]
        bos = self.tokenizer.bos_token_id
        skipped = 1 if bos is not None and chunks[0] and chunks[0][0] == bos else 0
        ids = chunks[0][:skipped]
        for position, chunk in enumerate(chunks):
            ids += [IMAGE_TOKEN_INDEX] * (position > 0) + chunk[skipped:]
        return ids

    def encode_images(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """(patches, H) features of each picture: hidden states of a layer without the class token, projected."""
        features = []
        for image in images:
            square = expand_to_square(image, tuple(int(x * 255) for x in MEAN)) if self.pads else image
            pixels = self.image_processor(square, return_tensors="pt")["pixel_values"]
            hidden = self.tower(pixels, output_hidden_states=True).hidden_states[self.config["mm_vision_select_layer"]]
            features.append(self.projector(hidden[0, 1:]))
        return features

    def splice(self, ids_T: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """prepare_inputs_labels_for_multimodal for one conversation without padding."""
        embed = self.language_model.get_input_embeddings()
        pieces, start = [], 0
        positions = torch.where(ids_T == IMAGE_TOKEN_INDEX)[0].tolist()
        for position, feature in zip(positions, features, strict=True):
            pieces += [embed(ids_T[start:position]), feature]
            start = position + 1
        return torch.cat([*pieces, embed(ids_T[start:])])


def expand_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """expand2square, with the smaller of the two offsets between which LLaVA-Med's draws."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
