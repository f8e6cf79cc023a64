"""Preflight: checks of store, data repository, judges, champion, cluster and disk before a round.

All probes run before any GPU is requested, and every failure comes with a remedy. Checks of a trained challenger belong
to clincot.promotion.
"""
