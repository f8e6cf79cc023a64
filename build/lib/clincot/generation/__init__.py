"""From questions to regions (hypotheses and grounders), and from regions to candidate answers.

`visual_cot` runs the same chain in one call for the server. Candidates are scored in clincot.judging.
"""
