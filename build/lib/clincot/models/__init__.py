"""Policies and judges: their protocols, checkpoints in this process, and OpenAI-compatible endpoints.

clincot.training trains models; clincot.synthetic builds the tiny models that ship with the demo.
"""
