"""Judges: a panel scores every candidate; its members are calibrated and combined, and sick ones are excluded.

Preference pairs built on the scores are clincot.preferences.
"""
