"""Training: margin-aware DPO and SFT on preference pairs, in one process, several, or a Kubeflow TrainJob.

Teaching the tiny models from labelled questions is clincot.synthetic.
"""
