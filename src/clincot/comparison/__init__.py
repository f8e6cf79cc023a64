"""The comparison of training methods: base, SFT on chosen, DPO and margin-DPO on the same data and seeds.

comparison_plan.py     what is run, one run of rounds a seed, and what it would cost
comparison_results.py  the metrics of every policy over all seeds, and the table
published_rows.py      results that others published for the same policies and data sets, with their sources
"""
