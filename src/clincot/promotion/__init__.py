"""The promotion gate: does a challenger replace the champion?

Paired cluster tests, an error budget over the pipeline's lifetime, floors on guarded metrics, leakage and judge health.
The metrics themselves are clincot.evaluation; publishing a promoted checkpoint is clincot.registry.
"""
