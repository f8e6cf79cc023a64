"""Targets of a rollout.

A rollout goes to KServe, by canaries or by two InferenceServices (blue-green), or to processes on this machine.
"""
