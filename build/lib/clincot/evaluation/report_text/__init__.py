"""Metrics of radiology reports: n-gram overlap, findings, and adapters of neural clinical metrics."""
