"""The controlled world of the demo: rendered radiographs with known answers, and the tiny models taught on them.

Nothing here is used on real data. Lessons, pre-training and question templates are for the shipped tiny models only.
"""
