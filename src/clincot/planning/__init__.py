"""What rounds cost before they run: requests, tokens, GPU-hours, memory, storage and money.

The generation, judging, pairing and evaluation code of a round is run on a sample of the questions with models that
count and compute nothing (dry_run.py), so the plan follows the code that it predicts. Counts become time by a roofline
of the GPU (stage_times.py), with assumptions that the plan prints (assumptions.py).
"""
