"""The model registry: published checkpoints under their digest, model cards, golden questions, the champion pointer.

Rolling a published checkpoint out is clincot.deployment.
"""
