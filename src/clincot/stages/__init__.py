"""The stages of a round: one list that the CLI, the loop of rounds, DVC and Kubeflow all share.

Each stage is one file with its function over named files; the logic lives in the package of its noun. The runner skips
a stage whose outputs are up to date.
"""
