"""The model registry.

It contains published checkpoints with their model cards and golden questions, and the champion pointers. A checkpoint
is stored under its digest. Rollouts of a published checkpoint are in clincot.deployment.
"""
