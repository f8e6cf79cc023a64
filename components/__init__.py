"""Kubeflow components, one folder each: lightweight components over an image that contains the library.

A body only calls clincot.pipelines.tasks. kfp copies the source of the function into the pipeline and runs it alone, so
the body imports everything that it names. A component of a stage has the inputs and outputs of the stage
(clincot.stages.catalog); tests/components checks this. The components that are not stages:

start_round        starts the round in the store, or resumes it from the policy from which it first started
merge              merges the files of the shards
record_round       records the digests and the decision of the round, before anything acts on the decision
page               renders the page of the round
deploy             rolls out the published checkpoint
end_round          records the end of the run's rounds, as its last task
select_champion    selects the champion for the next round of the same run
record_run_status  records that the run failed, if its round has not ended

Docstrings and README.md files are generated from pipelines/params.py: `make pipelines`.
"""

from __future__ import annotations

# Base image of every component. A compiled pipeline replaces it with the operator's images (pipelines/placement.py).
IMAGE = "clincot-cpu:latest"
