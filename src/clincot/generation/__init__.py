"""From a question to regions (hypotheses, grounders), and from regions to candidate answers.

`visual_cot` is the same chain as one call, as the server uses it. Scores of candidates are clincot.judging.
"""
