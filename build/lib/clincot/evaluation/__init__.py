"""Benchmark evaluation: answers given with every kind of region, and metrics with clustered intervals.

clincot.promotion decides on a promotion from these metrics; clincot.reporting builds pages and figures.
"""
