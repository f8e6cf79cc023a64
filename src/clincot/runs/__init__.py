"""Run folders and the history of a model's rounds: where files are, what began, what was made, how it ended."""
