"""Kubeflow component that starts a round."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def start_round(
    settings: str,
    champion: str,
    number: int,
    run: str,
    rounds: int,
) -> NamedTuple("Start", [("policy", str), ("policy_digest", str), ("policy_round", int), ("number", int)]):
    """Start the round in the store, or resume it from the policy from which it first started.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        champion: Policy from which the round would start (JSON).
        number: Number of the run's first round; 0: the next round of the model.
        run: Identifier of the pipeline run.
        rounds: Number of rounds in the run.

    Returns:
        policy: Address of the policy from which the run starts.
        policy_digest: sha256 of the policy that the task uses.
        policy_round: Round that trained the policy; 0: the base policy.
        number: Number of the run's first round; 0: the next round of the model.
    """
    from clincot.pipelines import tasks

    publish = tasks.read_section("start_round", settings, "publish")
    return tasks.start_round(publish, champion, number=int(number), run_id=run, rounds=int(rounds))
