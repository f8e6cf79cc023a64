"""Kubeflow component that starts a round."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def start_round(
    publish: dict,
    number: int,
    run: str,
    champion: dsl.Input[dsl.Artifact],
) -> NamedTuple("Start", [("policy", str), ("policy_digest", str), ("policy_round", int), ("number", int)]):
    """Start the round in the store, or resume it from the policy from which it first started."""
    from clincot.pipelines import tasks

    return tasks.start_round(publish, champion.path, number=int(number), run_id=run)
