"""Text-prompted segmentation models behind one function: an image and texts in, a probability per pixel out.

`bright` needs no weights and is for trying the path out; `clipseg` runs any CLIPSeg checkpoint with transformers;
`biomedparse` runs Microsoft's BiomedParse (version 1) from a checkout of its repository.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

Probabilities = npt.NDArray[np.float32]


class Segmenter(Protocol):
    """A text-prompted segmentation model."""

    def segment(self, image: Image.Image, texts: Sequence[str]) -> Probabilities:
        """(N, H, W) probabilities in [0, 1] that a pixel belongs to each of N texts, at the size of the RGB image."""
        ...


class BrightSegmenter:
    """What is much brighter than the rest of the image, whatever the text says."""

    def segment(self, image: Image.Image, texts: Sequence[str]) -> Probabilities:
        """See Segmenter."""
        grey_HW = np.asarray(image.convert("L"), dtype=np.float32)
        limit = grey_HW.mean() + 2 * grey_HW.std()
        return np.repeat((grey_HW > limit).astype(np.float32)[None], len(texts), axis=0)


class ClipSegSegmenter:
    """A CLIPSeg checkpoint (folder or hub name), such as CIDAS/clipseg-rd64-refined or one tuned on radiographs."""

    def __init__(self, checkpoint: str) -> None:
        import torch
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

        self._torch: Any = torch
        self._processor = CLIPSegProcessor.from_pretrained(checkpoint)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = CLIPSegForImageSegmentation.from_pretrained(checkpoint).eval().to(self._device)

    def segment(self, image: Image.Image, texts: Sequence[str]) -> Probabilities:
        """See Segmenter."""
        inputs = self._processor(text=list(texts), images=[image] * len(texts), padding=True, return_tensors="pt")
        with self._torch.inference_mode():
            logits = self._model(**inputs.to(self._device)).logits
        logits_NHW = logits.reshape(len(texts), *logits.shape[-2:])  # one text has no batch axis
        enlarged = self._torch.nn.functional.interpolate(
            logits_NHW[:, None], size=(image.height, image.width), mode="bilinear", align_corners=False
        )
        probabilities: Probabilities = enlarged[:, 0].sigmoid().float().cpu().numpy()
        return probabilities


class BiomedParseSegmenter:
    """BiomedParse version 1, from a checkout with its requirements and checkpoint (biomedparse_v1.pt or a hub address).

    The calls are those of example_prediction.py and inference_examples of github.com/microsoft/BiomedParse (44161089);
    this class has not been run here, because its weights were not available.
    """

    def __init__(self, checkpoint: str, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        import torch
        from inference_utils.inference import interactive_infer_image  # type: ignore[import-not-found]
        from modeling import build_model  # type: ignore[import-not-found]
        from modeling.BaseModel import BaseModel  # type: ignore[import-not-found]
        from utilities.arguments import load_opt_from_config_files  # type: ignore[import-not-found]
        from utilities.constants import BIOMED_CLASSES  # type: ignore[import-not-found]
        from utilities.distributed import init_distributed  # type: ignore[import-not-found]

        options = init_distributed(
            load_opt_from_config_files([str(checkout / "configs" / "biomedparse_inference.yaml")])
        )
        self._infer = interactive_infer_image
        self._model = BaseModel(options, build_model(options)).from_pretrained(checkpoint).eval().cuda()
        with torch.no_grad():
            encoder = self._model.model.sem_seg_head.predictor.lang_encoder
            encoder.get_text_embeddings([*BIOMED_CLASSES, "background"], is_eval=True)

    def segment(self, image: Image.Image, texts: Sequence[str]) -> Probabilities:
        """See Segmenter."""
        result = self._infer(self._model, image, list(texts))
        masks = result[0] if isinstance(result, tuple) else result  # the first version returned texts as well
        return np.asarray(masks, dtype=np.float32).clip(0.0, 1.0)


def load_segmenter(backend: str, checkpoint: str, checkout: Path) -> Segmenter:
    """The model that `--backend` names."""
    if backend == "clipseg":
        return ClipSegSegmenter(checkpoint)
    if backend == "biomedparse":
        return BiomedParseSegmenter(checkpoint, checkout)
    return BrightSegmenter()
