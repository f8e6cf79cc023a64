"""Run folders, and the history of a model's rounds in its store."""
