"""Training: vision pre-training, supervised fine-tuning and margin-aware DPO."""
