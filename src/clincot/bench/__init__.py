"""Evaluation: protocols, grounding, blind baseline, intervals, the gate and the page."""
