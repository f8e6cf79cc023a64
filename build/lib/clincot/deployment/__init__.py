"""Rollouts of a published checkpoint to an endpoint, in steps, with rollback.

`rollout` is the state machine, and `targets` are the places that it can deploy to. Publishing and the champion pointer
are in clincot.registry; the server behind the endpoint is in clincot.serving.
"""
