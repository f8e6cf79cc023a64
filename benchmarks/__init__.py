"""Measurements that are too long for the test suite; run one as `python -m benchmarks.NAME` in the repository root."""
