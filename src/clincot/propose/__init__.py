"""From a question to regions (hypotheses, grounders) and from regions to candidate answers."""
