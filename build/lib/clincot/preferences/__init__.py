"""Preference pairs (chosen, rejected, score gap) and their versions in a git and DVC repository.

The scores come from clincot.judging; clincot.training trains on the pairs.
"""
