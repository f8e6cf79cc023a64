"""Training: margin-aware DPO and SFT on preference pairs, in one process, in several, or as a Kubeflow TrainJob.

clincot.synthetic trains the tiny models from labelled questions.
"""
