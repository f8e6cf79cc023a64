"""The stages of a round: one list shared by the CLI, the loop of rounds, DVC and Kubeflow.

Each stage is one file: a function that reads and writes named files, and its description as a `Stage`. The logic lives
in the package that owns the noun. The runner skips a stage whose outputs are up to date.
"""
