"""Preference pairs (chosen, rejected, score gap) and their versions in a git and DVC repository.

Scores come from clincot.judging; training on pairs is clincot.training.
"""
