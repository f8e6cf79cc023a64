"""Ask a running `clincot serve` a question about an image, with the standard library only.

    clincot serve --checkpoint assets/policy --model-name policy
    python examples/05_query_endpoint.py film.png "Is pneumothorax seen?"

The image may be PNG, JPEG or DICOM. The reply has the whole chain: hypotheses, regions, and an answer from each.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import urllib.request
from pathlib import Path
from typing import Any


def ask(url: str, model: str, image: Path, question: str) -> dict[str, Any]:
    """Send one question over KServe's V1 protocol; return the prediction."""
    encoded = base64.b64encode(image.read_bytes()).decode()
    body = json.dumps({"instances": [{"question": question, "image": encoded}]}).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("CLINCOT_API_KEY"):  # if the server was started with --api-keys
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/v1/models/{model}:predict", body, headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        prediction: dict[str, Any] = json.load(reply)["predictions"][0]
    return prediction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", default="policy")
    args = parser.parse_args()
    prediction = ask(args.url, args.model, args.image, args.question)
    print(f"{prediction['answer']}   (confidence {prediction['confidence']:.2f})")
    for number, region in enumerate(prediction["regions"]):
        mark = "*" if number == prediction["winner"] else " "
        box = ", ".join(f"{region['box'][side]:.2f}" for side in ("x0", "y0", "x1", "y1"))
        print(f"{mark} {region['grounder']:8} {region['hypothesis']:20} [{box}]  {region['answer']}")


if __name__ == "__main__":
    main()
