"""Vision features, computed once for each picture and reused by every conversation that shows it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch

from clincot.errors import InvalidInput
from clincot.models.encoding import ConversationEncoder, concatenate_pictures
from clincot.prompts import ImageView

# Shape suffixes: F frames, T tokens of a frame, H hidden size.

# Families whose features of one picture are one (F, T, H) tensor that does not depend on the rest of the batch.
SHARED_FEATURE_FAMILIES = frozenset({"idefics3", "smolvlm"})

FeatureOutput = Literal["pooler_output", "last_hidden_state"]


class PictureFeatures:
    """A cache of features by picture that keeps the most recently used `kept_mb` megabytes.

    `output` selects the features: "pooler_output" is the image tokens as the language model gets them, and
    "last_hidden_state" is the tower's output before the connector. Models in this process with equal vision weights and
    image processors share one cache: a round trains the language side, so champion and challenger have the same tower.
    The cache is valid only while these weights do not change.
    """

    def __init__(
        self, model: Any, encoder: ConversationEncoder, *, output: FeatureOutput = "pooler_output", kept_mb: int = 256
    ) -> None:
        self.model, self.encoder, self.output = model, encoder, output
        self.encoded = 0  # pictures that were computed
        self._kept_bytes = kept_mb << 20
        self._features: OrderedDict[str, torch.Tensor] | None = None

    def __call__(self, pictures: Sequence[ImageView]) -> torch.Tensor:
        """(F, T, H) features of the pictures' frames, in order; each distinct picture is encoded once."""
        if self._features is None:
            processing = self.encoder.processor.image_processor.to_json_string()
            key = _hash_vision_weights(self.model, self.output, processing)
            self._features = _FEATURE_CACHES.setdefault(key, OrderedDict())
        cache = self._features
        missing = list({picture.key: picture for picture in pictures if picture.key not in cache}.values())
        for start in range(0, len(missing), 256):
            cache.update(self._compute_features(missing[start : start + 256]))
        for picture in pictures:
            cache.move_to_end(picture.key)
        out_FTH = torch.cat([cache[picture.key] for picture in pictures])
        if missing:
            size = sum(feature_FTH.nbytes for feature_FTH in cache.values())
            while size > self._kept_bytes and len(cache) > 1:
                size -= cache.popitem(last=False)[1].nbytes
        return out_FTH

    def _compute_features(self, pictures: Sequence[ImageView]) -> dict[str, torch.Tensor]:
        self.encoded += len(pictures)
        encoded = [self.encoder.encode_pictures([picture]).tensors for picture in pictures]
        frames = [tensors["pixel_values"].shape[1] for tensors in encoded]
        tensors = concatenate_pictures(encoded)
        inputs = {name: tensor.to(self.model.device) for name, tensor in tensors.items()}
        with torch.inference_mode():
            features_FTH = getattr(self.model.get_image_features(**inputs), self.output)
        # Idefics3 takes a frame whose normalised pixels are all 0 (one mid-grey value) for padding and drops it
        if features_FTH.shape[0] != sum(frames):
            raise InvalidInput(f"{pictures[0].path}: a picture of a single grey value cannot be encoded")
        # cloned, because a view would keep the whole chunk in memory after its neighbours are evicted
        of_pictures = zip(pictures, features_FTH.split(frames), strict=True)
        return {picture.key: feature_FTH.clone() for picture, feature_FTH in of_pictures}


_FEATURE_CACHES: dict[str, OrderedDict[str, torch.Tensor]] = {}


def clear_feature_caches() -> None:
    """Forget all features, as a new process would; the models of this one stay loaded."""
    for cache in _FEATURE_CACHES.values():
        cache.clear()


def _hash_vision_weights(model: Any, output: FeatureOutput, processing: str) -> str:
    """Digest of the weights, dtype, device and image processor (`processing`) that features depend on."""
    total = hashlib.sha256(f"{model.dtype} {model.device} {output} {processing}".encode())
    connector = (model.model.connector,) if output == "pooler_output" else ()
    for part in (model.model.vision_model, *connector):
        for name, tensor in sorted(part.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
