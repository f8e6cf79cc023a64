"""Radiographs with questions: the rendered benchmark and readers of published sets."""
