"""vLLM on the processor, from its own environment (`make test-vllm` makes it), serving a checkpoint and an adapter."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model

from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.service_settings import ServiceSettings
from clincot.models.vlm import load_checkpoint
from clincot.prompts import load_prompt_format, save_prompt_format
from tests.serving.conftest import POLICY
from tests.support import tiny
from tests.support.http_server import free_port
from tests.support.model_servers import ROOT, Served, serving, until
from tests.support.trace_collector import Collector, collect_traces

PYTHON = Path(os.environ.get("CLINCOT_VLLM", ROOT / ".venv-vllm" / "bin" / "python"))
BLOCK = 32  # tokens of a block of the prefix cache: the smallest that vLLM has on the processor


@dataclass(frozen=True)
class Vllm:
    host: str  # as KServe gives it: host:port
    log: Path

    def metric(self, name: str) -> float:
        """The sum of a counter over its labels."""
        lines = httpx.get(f"http://{self.host}/metrics", timeout=600).text.splitlines()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        assert found, f"vLLM has no metric {name}"
        return sum(found)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_set(tmp_path_factory.mktemp("films") / "data")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a LoRA adapter on the shipped policy, the same merged into its weights). Random, large enough to be heard, and
    the same in every run: peft draws A from the global generator, which depends on the tests that ran before."""
    folder = tmp_path_factory.mktemp("lora")
    model, processor = load_checkpoint(str(POLICY))
    targets = [n for n, _ in model.named_modules() if "text_model" in n and n.endswith((".q_proj", ".v_proj"))]
    assert targets
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    model.save_pretrained(folder / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    processor.save_pretrained(folder / "merged")
    save_prompt_format(folder / "merged", load_prompt_format(POLICY))
    return folder / "adapter", folder / "merged"


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """What vLLM and the transformer send of their traces."""
    with collect_traces() as collector:
        yield collector


@pytest.fixture(scope="session")
def vllm(adapter: tuple[Path, Path], collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """The shipped policy as `policy`, the adapter on it as `tuned`; traced as in an InferenceService."""
    if not PYTHON.is_file():
        pytest.skip(f"{PYTHON} is not there: `make test-vllm` makes vLLM's environment")
    folder, port = tmp_path_factory.mktemp("vllm"), free_port()
    command = [
        str(PYTHON),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(POLICY),
        "--served-model-name",
        "policy",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
        "--enforce-eager",
        "--limit-mm-per-prompt",
        '{"image": 5}',
        "--block-size",
        str(BLOCK),
        "--enable-prefix-caching",
        "--enable-lora",
        "--max-lora-rank",
        "8",
        "--lora-modules",
        f"tuned={adapter[0]}",
    ]
    settings = ServiceSettings(serve={"traces_endpoint": collector.url})
    model = build_inference_service(settings, "0" * 64, "s3://b/m", mode="Standard")["spec"]["predictor"]["model"]
    command += [argument for argument in model["args"] if "otlp" in argument]
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **{one["name"]: one["value"] for one in model["env"] if one["name"].startswith("OTEL_")},
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    found = Vllm(f"127.0.0.1:{port}", folder / "log")

    def ready() -> bool:
        assert process.poll() is None, found.log.read_text(errors="replace")[-5000:]
        try:
            return httpx.get(f"http://{found.host}/v1/models", timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until(ready, 1800)
        yield found
    finally:
        process.terminate()
        process.wait(timeout=600)


@pytest.fixture(scope="session")
def transformer(vllm: Vllm, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`clincot serve` in front of the predictor, as KServe starts it."""
    log = tmp_path_factory.mktemp("transformer") / "log"
    options = ["--checkpoint", str(POLICY), "--predictor_host", vllm.host, "--predictor-model", "policy"]
    options += ["--set", f"traces_endpoint={collector.url}"]
    with serving(log, *options) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("embedded") / "log"
    with serving(log, "--checkpoint", str(POLICY)) as server:
        server.wait_ready()
        yield server
