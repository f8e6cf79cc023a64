"""The promotion gate, which decides whether a challenger replaces the champion.

Paired cluster tests, an error budget over the pipeline's lifetime, floors on guarded metrics, and checks for leakage
and judge health. clincot.evaluation computes the metrics; clincot.registry publishes a promoted checkpoint.
"""
