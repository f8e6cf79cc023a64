"""The demo's controlled world: rendered radiographs with known answers, and the tiny models trained on them.

Nothing here is used on real data. Lessons, pre-training and question templates are for the shipped tiny models only.
"""
