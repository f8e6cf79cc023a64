"""What a round needs from outside, looked at before any GPU is asked for: every failure at once, each with its mend."""
