"""`vllm serve` without a model: a process that takes vLLM's arguments and answers in its shapes, faults included.

Run as a script, so that tests start it in place of vLLM (CLINCOT_VLLM). Copied from vLLM 0.32: options
(vllm/engine/arg_utils.py, argparse refuses others with status 2), /health (entrypoints/serve/instrumentator/health.py),
replies (entrypoints/openai/chat_completion/protocol.py), the 404 for an unknown model (entrypoints/openai/models/
serving.py), counters (v1/metrics/loggers.py), and the messages of too little memory (v1/core/kv_cache_utils.py).
Like vLLM it has a second process, the engine, and ends when that one has ended.

STAND_IN_FAULT: `slow` never becomes ready; `memory` ends at the start; `dies:N` and `memory:N` end while the (N+1)-th
request is answered. STAND_IN_IDS: the prompt's token ids, as JSON. STAND_IN_PIDS: file to which its process ids go.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ENGINE = [sys.executable, "-c", "import time; time.sleep(600)"]
NO_MEMORY = (
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing "
    "the engine."
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model_tag")
    for option in ("host", "dtype", "generation-config", "served-model-name", "lora-modules"):
        parser.add_argument(f"--{option}")
    for option in ("port", "max-num-seqs", "max-model-len", "block-size", "max-lora-rank"):
        parser.add_argument(f"--{option}", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--limit-mm-per-prompt", type=json.loads)
    for option in ("enable-prefix-caching", "enforce-eager", "enable-lora"):
        parser.add_argument(f"--{option}", action="store_true")
    return parser.parse_args()


class Engine:
    """What the handlers share."""

    def __init__(self, arguments: argparse.Namespace, fault: str) -> None:
        self.names = [arguments.served_model_name, *[(arguments.lora_modules or "").partition("=")[0]]]
        self.images = arguments.limit_mm_per_prompt["image"]
        self.fault, _, limit = fault.partition(":")
        self.limit = int(limit) if limit else math.inf
        self.ids = json.loads(os.environ.get("STAND_IN_IDS", "null"))
        self.answered, self.tokens = 0, 0
        self.lock = threading.Lock()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["model"] not in self.names:
            message = f"The model `{body['model']}` does not exist."
            return 404, {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}}
        text = json.dumps(body["messages"])
        if text.count('"image_url": {') > self.images:
            message = f"At most {self.images} image(s) may be provided in one prompt."
            return 400, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
        with self.lock:
            self.answered += 1
            self.tokens += 100
            if self.answered > self.limit:
                if self.fault == "memory":
                    print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", flush=True)
                os._exit(1)
        share = int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 0xFFFFFF
        word = "yes" if share > 0.5 else "no"
        top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in (("yes", share), ("no", 1 - share))]
        token = {"token": word, "logprob": -0.125, "bytes": None, "top_logprobs": top}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": word},
            "logprobs": {"content": [token]},
            "finish_reason": "stop",
        }
        ids = self.ids if body.get("return_token_ids") else None
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        return 200, {"object": "chat.completion", "choices": [choice], "usage": usage, "prompt_token_ids": ids}


def serve(arguments: argparse.Namespace, engine: Engine) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = engine.answer(body)
            self.send(status, json.dumps(reply).encode())

        def do_GET(self) -> None:
            if self.path == "/health":
                self.send(200, b"")
            elif self.path == "/v1/models":
                served = [{"id": name, "object": "model"} for name in engine.names if name]
                self.send(200, json.dumps({"object": "list", "data": served}).encode())
            else:
                labels = '{engine="0",model_name="policy"}'
                lines = [
                    f"vllm:prefix_cache_queries_total{labels} {float(engine.tokens)}",
                    f"vllm:prefix_cache_hits_total{labels} {engine.tokens * 0.75}",
                    f"vllm:external_prefix_cache_hits_total{labels} 7.0",
                ]
                self.send(200, ("\n".join(lines) + "\n").encode())

        def send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return ThreadingHTTPServer((arguments.host, arguments.port), Handler)


def main() -> None:
    arguments, fault = parse_arguments(), os.environ.get("STAND_IN_FAULT", "")
    process = subprocess.Popen(ENGINE)
    if "STAND_IN_PIDS" in os.environ:
        Path(os.environ["STAND_IN_PIDS"]).write_text(f"{os.getpid()} {process.pid}")
    print(f"INFO loading {arguments.model_tag}", flush=True)
    if fault == "memory":
        process.kill()
        sys.exit(NO_MEMORY)
    if fault == "slow":
        time.sleep(600)
    http = serve(arguments, Engine(arguments, fault))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    process.wait()
    sys.exit("EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.")


if __name__ == "__main__":
    main()
