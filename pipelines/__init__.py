"""Kubeflow: the round as a pipeline, where its tasks run, and how it is submitted. Importable as clincot.pipelines."""
