"""Policies and judges: protocols, in-process checkpoints and OpenAI-compatible endpoints."""
