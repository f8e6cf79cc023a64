"""The metrics that vLLM exports, which dashboards and alerts may use.

Source: vllm/v1/metrics/loggers.py of vLLM 0.32.0 (Apache-2.0): names, types and labels, with the suffix _total that
prometheus_client adds to counters. tests/serving_vllm compares them with a running vLLM.
"""

from __future__ import annotations

LABELS = frozenset({"model_name", "engine"})  # of all of them
_COUNTERS = {
    "generation_tokens": (),
    "mm_cache_hits": (),
    "mm_cache_queries": (),
    "num_preemptions": (),
    "prefix_cache_hits": (),
    "prefix_cache_queries": (),
    "prompt_tokens": (),
    "prompt_tokens_by_source": ("source",),
    "prompt_tokens_cached": (),
    "request_success": ("finished_reason",),
}
_GAUGES = {
    "engine_sleep_state": ("sleep_state",),
    "kv_cache_usage_perc": (),
    "num_requests_running": (),
    "num_requests_waiting": (),
    "num_requests_waiting_by_reason": ("reason",),
}
_HISTOGRAMS = (
    "e2e_request_latency_seconds",
    "inter_token_latency_seconds",
    "iteration_tokens_total",
    "request_decode_time_seconds",
    "request_generation_tokens",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_prompt_tokens",
    "request_queue_time_seconds",
    "request_time_per_output_token_seconds",
    "time_to_first_token_seconds",
)
# name of a sample: its labels
VLLM_SAMPLES: dict[str, frozenset[str]] = {
    **{f"vllm:{name}_total": LABELS | set(more) for name, more in _COUNTERS.items()},
    **{f"vllm:{name}": LABELS | set(more) for name, more in _GAUGES.items()},
    **{f"vllm:{name}_{part}": LABELS for name in _HISTOGRAMS for part in ("sum", "count")},
    **{f"vllm:{name}_bucket": LABELS | {"le"} for name in _HISTOGRAMS},
}
