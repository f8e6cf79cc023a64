"""Kubeflow components, one a folder: lightweight components over an image that holds the library.

A body only calls clincot.pipelines.tasks. kfp takes its source text and runs it by itself, so everything it names is imported in
it. What a stage reads and writes is said in stages.py alone; tests/components holds every component to it.
Importable as clincot.components.
"""

from __future__ import annotations

# What every component is built on. Where a pipeline runs (pipelines/placement.py) sets the operator's images instead.
IMAGE = "clincot-cpu:latest"
