"""Kubeflow components, one folder each: lightweight components over an image that contains the library.

A body only calls clincot.pipelines.tasks. kfp.local runs a copy of the source of the function, so the body imports
everything that it names; on a cluster, clincot.pipelines.run_component runs the function of the image. Every component
but the first gets the address of its settings (clincot.pipelines.run_settings). Which stages a component runs is in
clincot.pipelines.cluster_settings. These run none:

start_round        starts the round in the store, or resumes it from the policy from which it first started
record_round       records the digests and the decision of the round, before anything acts on the decision
deploy             rolls out the published checkpoint
end_round          records the end of the run's rounds
page               renders the page of the round
select_champion    selects the champion for the next round of the same run
record_run_status  records that the run failed, if its round has not ended

Those of the comparison (clincot.pipelines.comparison_pipeline): start_comparison, compare_seed, compare_table.

Docstrings and README.md files are generated from pipelines/params.py: `make pipelines`.
"""

from __future__ import annotations

# Base image of every component. A compiled pipeline replaces it with the operator's images (pipelines/placement.py).
IMAGE = "clincot-cpu:latest"
