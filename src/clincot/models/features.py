"""What a vision encoder makes of pictures, computed once a picture and reused by every conversation that shows it."""

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

# Families whose features of one picture are one (F, T, H) tensor, whatever else is in the batch.
SHARED_FEATURE_FAMILIES = frozenset({"idefics3", "smolvlm"})

FeatureOutput = Literal["pooler_output", "last_hidden_state"]


class PictureFeatures:
    """Features by picture, of which the most recently used `kept_mb` are kept.

    `output` names what is kept: "pooler_output", the image tokens as the language model gets them, or
    "last_hidden_state", what the tower gives to the connector. Models in this process whose weights up to there and
    whose image processors are the same share them: a round trains the language side, so champion and challenger see
    through one tower. Right only while these weights do not change.
    """

    def __init__(
        self, model: Any, encoder: ConversationEncoder, *, output: FeatureOutput = "pooler_output", kept_mb: int = 256
    ) -> None:
        self.model, self.encoder, self.output = model, encoder, output
        self._kept_bytes = kept_mb << 20
        self._features: OrderedDict[str, torch.Tensor] | None = None

    def __call__(self, pictures: Sequence[ImageView]) -> torch.Tensor:
        """(F, T, H) features of the pictures' frames, in order; each distinct picture is encoded once."""
        if self._features is None:
            seen_as = self.encoder.processor.image_processor.to_json_string()
            self._features = _FEATURE_CACHES.setdefault(
                _hash_vision_weights(self.model, self.output, seen_as), OrderedDict()
            )
        kept = self._features
        missing = list({p.key: p for p in pictures if p.key not in kept}.values())
        for at in range(0, len(missing), 256):
            kept.update(self._compute_features(missing[at : at + 256]))
        for picture in pictures:
            kept.move_to_end(picture.key)
        out_FTH = torch.cat([kept[picture.key] for picture in pictures])
        if missing:
            size = sum(feature.nbytes for feature in kept.values())
            while size > self._kept_bytes and len(kept) > 1:
                size -= kept.popitem(last=False)[1].nbytes
        return out_FTH

    def _compute_features(self, pictures: Sequence[ImageView]) -> dict[str, torch.Tensor]:
        encoded = [self.encoder.encode_pictures([picture]).tensors for picture in pictures]
        frames = [tensors["pixel_values"].shape[1] for tensors in encoded]
        tensors = concatenate_pictures(encoded)
        with torch.inference_mode():
            inputs = {k: v.to(self.model.device) for k, v in tensors.items()}
            features_FTH = getattr(self.model.get_image_features(**inputs), self.output)
        if features_FTH.shape[0] != sum(frames):
            raise InvalidInput(f"{pictures[0].path}: a picture of a single grey value cannot be encoded")
        # cloned: a view would keep the whole chunk alive after its neighbours are dropped
        return {p.key: f.clone() for p, f in zip(pictures, features_FTH.split(frames), strict=True)}


_FEATURE_CACHES: dict[str, OrderedDict[str, torch.Tensor]] = {}


def _hash_vision_weights(model: Any, output: FeatureOutput, seen_as: str) -> str:
    """Names the weights, dtype, device and image processor (`seen_as`) that features come from."""
    total = hashlib.sha256(f"{model.dtype} {model.device} {output} {seen_as}".encode())
    connector = (model.model.connector,) if output == "pooler_output" else ()
    for part in (model.model.vision_model, *connector):
        for name, tensor in sorted(part.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
