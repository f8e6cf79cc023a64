"""The list of vLLM's metrics, with which the chart's dashboards are checked, is what a running vLLM exports."""

from __future__ import annotations

import httpx

from tests.serving_vllm.conftest import Vllm
from tests.support.exported_samples import read_samples
from tests.support.vllm_metrics import VLLM_SAMPLES


def test_vllm_exports_the_listed_metrics(vllm: Vllm) -> None:
    """After an answer, so that metrics whose labels depend on it have a sample."""
    request = {"model": "policy", "prompt": "Is there a nodule?", "max_tokens": 2}
    assert httpx.post(f"http://{vllm.host}/v1/completions", json=request, timeout=600).status_code == 200
    exported = read_samples(httpx.get(f"http://{vllm.host}/metrics", timeout=600).text)
    assert {name: labels - exported.get(name, frozenset()) for name, labels in VLLM_SAMPLES.items()} == {
        name: frozenset() for name in VLLM_SAMPLES
    }
