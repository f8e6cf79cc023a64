"""A grounder as a web service, with the standard library, numpy and Pillow only.

    python examples/03_http_grounder.py --port 9000
    clincot propose … --set 'propose.grounders={http: 2, written: 4}' --set propose.http_url=http://127.0.0.1:9000/ground

The request has an image and hypotheses; the reply has boxes. This service "finds" the brightest square of a grid for
every hypothesis. Put your segmentation or grounding model into `find_region`.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

GRID = 4  # the image is searched in GRID x GRID cells


def find_region(image: Image.Image, hypothesis: str) -> dict[str, object]:
    """Return the region for a hypothesis: a box, normalised x0, y0, x1, y1, with a confidence from 0 to 1."""
    cells = np.asarray(image.convert("L").resize((GRID, GRID), Image.Resampling.BOX), dtype=float)
    row, column = (int(index) for index in np.unravel_index(int(cells.argmax()), cells.shape))
    box = [column / GRID, row / GRID, (column + 1) / GRID, (row + 1) / GRID]
    return {"hypothesis": hypothesis, "box": box, "confidence": float(cells.max() / 255)}


class GroundingHandler(BaseHTTPRequestHandler):
    """Answers POST {"image": base64 PNG, "hypotheses": [...]} with {"regions": [...]}."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image = Image.open(io.BytesIO(base64.b64decode(request["image"])))
        regions = [find_region(image, hypothesis) for hypothesis in request["hypotheses"]]
        body = json.dumps({"regions": regions}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: paths and sizes of medical images do not belong in logs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9000, help="0 picks a free port")
    server = ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), GroundingHandler)
    print(f"http://127.0.0.1:{server.server_port}/ground", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
