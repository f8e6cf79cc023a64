"""Checkpoints in the original LLaVA layouts, converted to the Llava class of transformers."""
