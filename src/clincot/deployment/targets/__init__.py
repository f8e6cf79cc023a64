"""Where a rollout can go: KServe canaries, two InferenceServices (blue-green), or processes on this machine."""
