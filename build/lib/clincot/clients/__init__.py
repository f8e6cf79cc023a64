"""Shared clients of external services: HTTP with JSON bodies, and the Kubernetes API.

The S3 client is clincot.storage.s3; the Kubeflow Pipelines client is clincot.pipelines.client.
"""
