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
    """Publish the promoted checkpoint in the model registry, with its evidence."""
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
