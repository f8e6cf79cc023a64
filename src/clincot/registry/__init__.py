"""The model registry: published checkpoints, their model cards and golden questions, and the champion pointer.

A checkpoint is stored under its digest. Rollouts of a published checkpoint are in clincot.deployment.
"""
