"""A segmentation server for ClinCoT's grounder `http`: KServe's V2 protocol, a text-prompted model behind it.

    python examples/segmenter/server.py --backend bright --port 8085
    clincot propose … --set 'propose.grounders={http: 2, written: 4}' --set propose.http_protocol=kserve-v2 \\
        --set propose.http_url=http://127.0.0.1:8085 --set propose.http_model=segmenter

A request has the inputs `image` (BYTES, one base64 PNG) and `text` (BYTES, N prompts). The reply has the outputs
`masks` (BYTES, N base64 PNG of 8-bit grey: the probability of each pixel) and `scores` (FP32, N: the mean probability
of what is more likely than not).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from backends import Segmenter, load_segmenter
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.errors import InvalidInput
from PIL import Image

MAX_SIDE = 8192  # pixels; larger images are refused before they are decoded


class SegmenterModel(Model):
    """The segmenter as a model of KServe's server."""

    def __init__(self, name: str, segmenter: Segmenter) -> None:
        super().__init__(name)
        self.segmenter = segmenter
        self.ready = True

    async def predict(self, payload: InferRequest, *_: Any, **__: Any) -> InferResponse:
        """Segment one image for every text."""
        inputs = {tensor.name: tensor for tensor in payload.inputs}
        if set(inputs) != {"image", "text"}:
            raise InvalidInput(f"expected the inputs image and text, got {', '.join(inputs) or 'none'}")
        image = read_image(inputs["image"])
        texts = [read_text(value) for value in inputs["text"].data]
        if not texts:
            raise InvalidInput("expected at least one text")
        probabilities_NHW = await asyncio.to_thread(self.segmenter.segment, image, texts)
        masks = [encode_mask(mask_HW) for mask_HW in probabilities_NHW]
        scores = [measure_confidence(mask_HW) for mask_HW in probabilities_NHW]
        return InferResponse(
            response_id=payload.id or "",
            model_name=self.name,
            infer_outputs=[
                InferOutput("masks", [len(texts)], "BYTES", masks),
                InferOutput("scores", [len(texts)], "FP32", scores),
            ],
        )


def read_image(tensor: InferInput) -> Image.Image:
    """The one image of a request as RGB. Raises InvalidInput."""
    if len(tensor.data) != 1:
        raise InvalidInput(f"expected one image, got {len(tensor.data)}")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(read_text(tensor.data[0]))), formats=("PNG",))
        if max(image.size) > MAX_SIDE:
            raise InvalidInput(f"expected an image of at most {MAX_SIDE} pixels a side, got {image.size}")
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidInput(f"expected a base64 PNG ({type(error).__name__})") from None


def read_text(value: str | bytes) -> str:
    """An element of a BYTES tensor, which is text in JSON and bytes in a binary request."""
    return value.decode() if isinstance(value, bytes) else value


def encode_mask(probabilities_HW: np.ndarray) -> str:
    """Probabilities as a base64 PNG of 8-bit grey."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(probabilities_HW * 255).astype(np.uint8)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def measure_confidence(probabilities_HW: np.ndarray) -> float:
    """The mean probability of the pixels that are more likely than not; 0 if there is none."""
    found = probabilities_HW[probabilities_HW >= 0.5]
    return round(float(found.mean()), 6) if found.size else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a text-prompted segmentation model by KServe's V2 protocol.")
    parser.add_argument("--backend", choices=("bright", "clipseg", "biomedparse"), default="bright")
    parser.add_argument("--checkpoint", default="CIDAS/clipseg-rd64-refined", help="Folder, file or hub name.")
    parser.add_argument("--checkout", type=Path, default=Path("/BiomedParse"), help="Of BiomedParse's repository.")
    parser.add_argument("--name", default="segmenter", help="Name of the model in the path of requests.")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    segmenter = load_segmenter(options.backend, options.checkpoint, options.checkout)
    server = ModelServer(http_port=options.port, workers=1, enable_grpc=False, access_log_format=None)
    server.start([SegmenterModel(options.name, segmenter)])


if __name__ == "__main__":
    main()
