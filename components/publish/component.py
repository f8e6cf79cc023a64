"""Kubeflow component of the publish stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def publish(
    publish: dict,
    number: int,
    ahead: int,
    benchmark: str,
    benchmark_digest: str,
    image: str,
    checkpoint: dsl.Input[dsl.Model],
    report: dsl.Input[dsl.Artifact],
    decision: dsl.Input[dsl.Artifact],
    panel_report: dsl.Input[dsl.Artifact],
    published: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Publish the promoted checkpoint in the model registry, with its evidence.

    Args:
        publish: Settings of the model registry: store, name of the model, golden questions.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, starting at 0.
        benchmark: Address of the held-out data set with its answer key.
        benchmark_digest: sha256 of the benchmark, part of the cache key.
        image: Image or source version, which stands for the code in the cache key.
        checkpoint: Folder of a model's weights, tokenizer and record, which `train` writes.
        report: JSON report of the stage: all checks from `preflight`, the benchmark's metrics from `evaluate`.
        decision: JSON of the verdict (promote, keep or blocked) with its checks, which `decide` writes.
        panel_report: JSON report of the judges: who scored, who was left out, how far they agree; `judge` writes it.

    Returns:
        published: JSON manifest of the stored checkpoint, which `publish` writes.
        metrics: Figures of the task for the Kubeflow UI.
        Output: sha256 of the published checkpoint.
    """
    import json
    from pathlib import Path

    from clincot.pipelines import params, tasks

    with tasks.user_errors("publish"):
        config = params.build_publish_config(publish, int(number) + int(ahead))
    inputs = {
        "checkpoint": checkpoint.path,
        "report": report.path,
        "decision": decision.path,
        "panel_report": panel_report.path,
        "golden": benchmark,
    }
    tasks.run_stage_task("publish", config, inputs, {"published": published.path}, metrics=metrics)
    return json.loads(Path(published.path).read_text(encoding="utf-8"))["sha256"]
