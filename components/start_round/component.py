"""Kubeflow component that starts a round."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def start_round(
    publish: dict,
    number: int,
    rounds: int,
    run: str,
    champion: dsl.Input[dsl.Artifact],
) -> NamedTuple("Start", [("policy", str), ("policy_digest", str), ("policy_round", int), ("number", int)]):
    """Start the round in the store, or resume it from the policy from which it first started.

    Args:
        publish: Settings of the model registry: store, name of the model, golden questions.
        number: Number of the run's first round; 0: the next round of the model.
        rounds: Number of rounds in the run.
        run: Identifier of the pipeline run.
        champion: Policy that preflight found (JSONL, one StartingPolicy).

    Returns:
        policy: Address of the checkpoint from which the run starts.
        policy_digest: sha256 of the checkpoint that the task uses, part of the cache key.
        policy_round: Round that trained the checkpoint from which the run starts; 0: the base policy.
        number: Number of the run's first round; 0: the next round of the model.
    """
    from clincot.pipelines import tasks

    return tasks.start_round(publish, champion.path, number=int(number), run_id=run, rounds=int(rounds))
