"""Vision features, computed once for each picture and reused by every conversation that shows it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clincot.errors import InvalidInput
from clincot.models.encoding import (
    ConversationEncoder,
    EncodedConversation,
    Tensors,
    batch_pictures,
    concatenate_pictures,
)
from clincot.models.sized_cache import SizedCache
from clincot.models.work_count import WorkCount
from clincot.prompts import ImageView

# Shape suffixes: F frames, T tokens of a frame or picture, H hidden size.

# Families whose features of one picture are one (F, T, H) tensor that does not depend on the rest of the batch. They
# are trained on features, and relevance maps are read from them.
FRAME_FEATURE_FAMILIES = frozenset({"idefics3", "smolvlm"})
# Families whose features of one picture do not depend on the rest of the batch, and whose forward pass takes them.
SHARED_FEATURE_FAMILIES = FRAME_FEATURE_FAMILIES | {
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "gemma3",
    "paligemma",
}
# These take a list with the features of each picture, the others one tensor.
_LISTED_FEATURE_FAMILIES = {"llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}

FeatureOutput = Literal["pooler_output", "last_hidden_state"]

_ALONE = " alone"
_READ_PICTURES = 64  # pictures whose pixels are held at once, at most
_CHUNK_NUMBERS = 1 << 23  # numbers of the pixel tensors that are encoded at once: 25 pictures of 336 x 336 pixels
_CACHE_MB = 256  # of a processor's memory
_GPU_SHARE = 0.05  # of a GPU's memory: features of a 7B model take some 5 MB a picture


@dataclass(frozen=True)
class PictureFeature:
    """What the language model gets of one picture.

    tokens: (F, T, H) in families with frames, (T, H) in others. deepstack: (T, H) for each of its first layers
    (Qwen3-VL). grid: (1, 3) frames, rows and columns of patches, from which Qwen's positions are computed.
    """

    tokens: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()
    grid: torch.Tensor | None = None

    def clone(self) -> PictureFeature:
        return PictureFeature(self.tokens.clone(), tuple(layer.clone() for layer in self.deepstack), self.grid)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(layer.nbytes for layer in self.deepstack)


class PictureFeatures:
    """A cache of features by picture that keeps the most recently used `kept_mb` megabytes.

    `output` selects the features: "pooler_output" is the image tokens as the language model gets them, and
    "last_hidden_state" is the tower's output before the connector. Models in this process with equal vision weights and
    image processors share one cache: a round trains the language side, so champion and challenger have the same tower.
    The cache is valid only while these weights do not change. kept_mb: by default 256, or 5 % of a GPU's memory. work:
    where pictures that are encoded are counted.
    """

    def __init__(
        self,
        model: Any,
        encoder: ConversationEncoder,
        *,
        output: FeatureOutput = "pooler_output",
        kept_mb: int | None = None,
        work: WorkCount | None = None,
    ) -> None:
        self.model, self.encoder, self.output = model, encoder, output
        self.work = work or WorkCount()
        self._kept_bytes = (_choose_cache_mb(model.device) if kept_mb is None else kept_mb) << 20
        self._features: SizedCache[PictureFeature] | None = None

    def __call__(self, pictures: Sequence[ImageView]) -> torch.Tensor:
        """(F, T, H) features of the pictures' frames, in order; each distinct picture is encoded once.

        For families with frames only.
        """
        features = self.fetch([(picture, False) for picture in pictures])
        return torch.cat([feature.tokens for feature in features])

    def fetch(self, shown: Sequence[tuple[ImageView, bool]]) -> list[PictureFeature]:
        """The features of pictures, in order; each distinct picture is encoded once.

        shown: each picture, and whether its conversation shows no other.
        """
        cache = self._get_cache()
        suffixes = ("", "" if self.encoder.pictures_are_independent else _ALONE)
        keyed = [(f"{picture.key}{suffixes[alone]}", picture) for picture, alone in shown]
        missing = {key: picture for key, picture in keyed if key not in cache}
        for key, feature in self._compute_features(missing):
            cache.add(key, feature)
        features = [cache[key] for key, _ in keyed]
        cache.shrink(self._kept_bytes)
        return features

    def build_outputs(self, features: Sequence[PictureFeature]) -> BaseModelOutputWithPooling:
        """Features as the family's forward method takes them (`mm_encoder_outputs`)."""
        tokens = [feature.tokens for feature in features]
        kind = self.model.config.model_type
        pooled = tokens if kind in _LISTED_FEATURE_FAMILIES else torch.cat(tokens)
        if not features[0].deepstack:
            return BaseModelOutputWithPooling(pooler_output=pooled)
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        of_pictures = [feature.deepstack for feature in features]
        layers = [list(layer) for layer in zip(*of_pictures, strict=True)]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=layers)

    def _get_cache(self) -> SizedCache[PictureFeature]:
        if self._features is None:
            processing = self.encoder.processor.image_processor.to_json_string()
            key = _hash_vision_weights(self.model, self.output, processing)
            self._features = _FEATURE_CACHES.setdefault(key, SizedCache(lambda feature: feature.nbytes))
        return self._features

    def _compute_features(self, missing: dict[str, ImageView]) -> Iterator[tuple[str, PictureFeature]]:
        if not missing:
            return
        self.work.encodes += len(missing)
        if not self.encoder.pictures_are_independent:
            yield from self._compute_dependent(missing)
            return
        keys = list(missing)
        for start in range(0, len(keys), _READ_PICTURES):
            read = keys[start : start + _READ_PICTURES]
            tensors = self.encoder.encode_separately([missing[key] for key in read])
            largest = max(one["pixel_values"].numel() for one in tensors)
            step = max(1, _CHUNK_NUMBERS // largest)
            for at in range(0, len(read), step):
                features = self._encode_tensors(tensors[at : at + step], missing)
                yield from zip(read[at : at + step], features, strict=True)

    def _compute_dependent(self, missing: dict[str, ImageView]) -> Iterator[tuple[str, PictureFeature]]:
        """LLaVA-OneVision, which tiles a picture that its conversation shows by itself and no other."""
        alone = {key: picture for key, picture in missing.items() if key.endswith(_ALONE)}
        for key, picture in alone.items():
            yield key, self._encode_tensors([self.encoder.encode_pictures([picture]).tensors], missing)[0]
        others = [key for key in missing if key not in alone]
        for start in range(0, len(others), _READ_PICTURES):
            keys = others[start : start + _READ_PICTURES]
            shown = [missing[key] for key in keys]
            shown = shown * 2 if len(shown) == 1 else shown
            tensors = self.encoder.encode_together(shown).tensors
            yield from zip(keys, self._encode_tensors([tensors], missing), strict=False)

    def _encode_tensors(self, encoded: Sequence[Tensors], missing: dict[str, ImageView]) -> list[PictureFeature]:
        framed = self.model.config.model_type in FRAME_FEATURE_FAMILIES
        tensors = concatenate_pictures(encoded) if framed else batch_pictures(encoded)
        inputs = {name: tensor.to(self.model.device) for name, tensor in tensors.items()}
        with torch.inference_mode():
            out = self.model.get_image_features(**inputs, return_dict=True)
        pooled = getattr(out, self.output)
        if framed:
            frames = [one["pixel_values"].shape[1] for one in encoded]
            # Idefics3 takes a frame whose normalised pixels are all 0 (one mid-grey value) for padding and drops it
            if pooled.shape[0] != sum(frames):
                first = next(iter(missing.values()))
                raise InvalidInput(f"{first.path}: a picture of a single grey value cannot be encoded")
            features = [PictureFeature(tokens_FTH) for tokens_FTH in torch.split(pooled, frames)]
        elif isinstance(pooled, torch.Tensor):  # (tiles, T, H)
            tiles = [one["pixel_values"].shape[0] for one in encoded]
            features = [PictureFeature(part.flatten(0, 1)) for part in torch.split(pooled, tiles)]
        else:
            layers = getattr(out, "deepstack_features", None) or []
            deepstack = list(zip(*layers, strict=True)) or [()] * len(pooled)
            grids = torch.split(tensors["image_grid_thw"], 1) if "image_grid_thw" in tensors else [None] * len(pooled)
            features = [PictureFeature(*parts) for parts in zip(pooled, deepstack, grids, strict=True)]
        # cloned, because a view would keep the whole chunk in memory after its neighbours are evicted
        return [feature.clone() for feature in features]


def list_shown(conversations: Sequence[EncodedConversation]) -> list[tuple[ImageView, bool]]:
    """All pictures of some conversations in order, each with whether its conversation shows no other."""
    shown: list[tuple[ImageView, bool]] = []
    for conversation in conversations:
        alone = len(conversation.pictures) == 1
        shown += [(picture, alone) for picture in conversation.pictures]
    return shown


_FEATURE_CACHES: dict[str, SizedCache[PictureFeature]] = {}


def clear_feature_caches() -> None:
    """Forget all features, as a new process would; the models of this one stay loaded."""
    for cache in _FEATURE_CACHES.values():
        cache.clear()


def _choose_cache_mb(device: torch.device) -> int:
    if device.type != "cuda":
        return _CACHE_MB
    total: int = torch.cuda.get_device_properties(device).total_memory
    return max(_CACHE_MB, int(total * _GPU_SHARE) >> 20)


def _hash_vision_weights(model: Any, output: FeatureOutput, processing: str) -> str:
    """Digest of the weights, dtype, device and image processor (`processing`) that features depend on."""
    total = hashlib.sha256(f"{model.dtype} {model.device} {output} {processing}".encode())
    ignored = ["language_model.", "text_model."] + ["connector."] * (output == "last_hidden_state")
    for name, tensor in sorted(model.model.state_dict().items()):
        if not name.startswith(tuple(ignored)):
            total.update(name.encode())
            total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
