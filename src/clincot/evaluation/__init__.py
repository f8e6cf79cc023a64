"""Benchmark evaluation: answers from every kind of region, and their metrics with clustered intervals.

The promotion decision built on these metrics is clincot.promotion; pages and figures are clincot.reporting.
"""
