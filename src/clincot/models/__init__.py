"""Policies and judges: the protocols they follow, checkpoints in this process, and OpenAI-compatible endpoints.

Training a model is clincot.training; the tiny models that ship with the demo are built in clincot.synthetic.
"""
