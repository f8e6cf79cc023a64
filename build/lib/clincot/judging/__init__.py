"""Judging: a panel scores every candidate; calibrated scores are combined, and failing judges are excluded.

Preference pairs are built from the scores in clincot.preferences.
"""
