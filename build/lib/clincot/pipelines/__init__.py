"""The round as a Kubeflow pipeline: its tasks, where they run, and how runs are submitted and scheduled."""
