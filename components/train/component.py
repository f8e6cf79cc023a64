"""Kubeflow component of the train stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    settings: str,
    policy: str,
    policy_digest: str,
    lap: int,
    data_version: str,
    preferences: dsl.Input[dsl.Dataset],
    challenger: dsl.Output[dsl.Model],
    trained: dsl.Input[dsl.Model] = None,
) -> str:
    """Train the challenger on the preference pairs with margin-aware DPO.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        policy: Address of the policy from which the run starts.
        policy_digest: sha256 of the policy that the task uses.
        lap: How often earlier rounds used the questions.
        data_version: sha256 of the record of the data version.
        preferences: Folder: regions, candidates, judgements, scores, pairs.
        trained: Challenger of the previous round; replaces `policy`.

    Returns:
        challenger: Challenger: weights, tokenizer and record.
        Output: sha256 of the challenger.
    """
    from clincot.pipelines import tasks

    digest = tasks.train(
        settings,
        preferences.path,
        data_version,
        challenger.path,
        policy=trained.path if trained else policy,
        lap=int(lap),
    )
    challenger.metadata.update({"sha256": digest, "trained from": policy_digest})
    return digest
