"""Rollouts: from a published checkpoint to an endpoint that answers, in steps, with rollback.

`rollout` is the state machine, `targets` are the places it can deploy to. Publishing and the champion pointer are
clincot.registry; the server that runs behind the endpoint is clincot.serving.
"""
