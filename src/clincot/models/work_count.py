"""Counts of what a model in this process has computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class WorkCount:
    """What a model has computed since it was loaded."""

    requests: int = 0  # conversations that were answered or rated
    prompt_tokens: int = 0  # of these conversations, pictures included, without padding
    new_tokens: int = 0  # that were generated, the ends of turns included
    encodes: int = 0  # pictures that went through the vision encoder
    prefill_tokens: int = 0  # of prompts that went through the language model; less than prompt_tokens if shared
    decode_tokens: int = 0  # rows times steps after the prefill, ended replies included that were still in their batch
