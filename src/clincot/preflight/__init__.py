"""Checks before a round: stores, judges, champion, cluster and disk, each failure with its remedy.

All probes run before any GPU is requested. Checks of a trained challenger belong to clincot.promotion.
"""
