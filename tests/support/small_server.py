"""A small server with the routes that a rollout needs; it answers golden questions from the checkpoint's manifest.

Usage: python small_server.py CHECKPOINT PORT [--die-after N] [--wrong] [--never-ready]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--die-after", type=int, default=0, help="end the process after this many answers")
    parser.add_argument("--wrong", action="store_true")
    parser.add_argument("--never-ready", action="store_true")
    args = parser.parse_args()
    manifest = json.loads((args.checkpoint / "manifest.json").read_text())
    golden = {one["question"]: one for one in manifest["golden"]}
    answered = [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            if self.path == "/v2/health/ready":
                self.reply(503 if args.never_ready else 200, {})
            elif self.path == "/openai/v1/models":
                self.reply(200, {"object": "list", "data": [{"id": "small", "object": "model"}]})
            else:
                self.reply(404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answered[0] += 1
            if args.die_after and answered[0] > args.die_after:
                os._exit(3)
            text = body["messages"][0]["content"][1]["text"]
            one = golden.get(text, {"answer": "I do not know", "box": {"x0": 0, "y0": 0, "x1": 1, "y1": 1}})
            answer = "perhaps" if args.wrong else one["answer"]
            message = {"role": "assistant", "content": answer}
            regions = [{"box": one["box"], "answer": answer}]
            self.reply(
                200,
                {
                    "model": manifest["sha256"],
                    "choices": [{"message": message}],
                    "clincot": {"regions": regions, "winner": 0},
                },
            )

        def reply(self, status: int, content: object) -> None:
            encoded = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, format: str, *args: object) -> None:
            pass

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
