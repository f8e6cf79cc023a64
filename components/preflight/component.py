"""Looks at everything that the round needs, and says once what it starts from."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def preflight(
    preflight: dict,
    judge: dict,
    publish: dict,
    version: dict,
    service: dict,
    launch: dict,
    data: str,
    benchmark: str,
    number: int,
    run: str,
    report: dsl.Output[dsl.Artifact],
    table: dsl.Output[dsl.Markdown],
    champion: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple(
    "Start",
    [
        ("policy", str),
        ("policy_digest", str),
        ("policy_round", int),
        ("number", int),
        ("data_digest", str),
        ("benchmark_digest", str),
        ("panel_digest", str),
    ],
):
    from clincot.pipelines import tasks

    return tasks.preflight(
        {"preflight": preflight, "judge": judge, "publish": publish, "version": version},
        service,
        launch,
        {"report": report.path, "table": table.path, "champion": champion.path},
        data=data,
        benchmark=benchmark,
        number=int(number),
        run_id=run,
        metrics=metrics,
    )
