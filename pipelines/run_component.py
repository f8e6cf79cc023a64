"""Runs a component of the library in a pod, as kfp's own entry point runs a copy of its source.

The launcher of Kubeflow Pipelines calls

    python3 -m clincot.pipelines.run_component --executor_input JSON --function_to_execute NAME

with the arguments that kfp compiles for every component in Python (kfp/dsl/executor_main.py at 2.17.0). The compiled
pipeline names this module instead of a copy of the source (pipeline_builder.shorten_commands).
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from typing import Any

from kfp.dsl.executor import Executor


def load_component(name: str) -> Any:
    """Return the kfp component of a task."""
    return getattr(importlib.import_module(f"clincot.components.{name}.component"), name)


def run_component(name: str, executor_input: str) -> None:
    """Run the body of a component. executor_input: JSON of an ExecutorInput, with the paths of its artifacts."""
    body = load_component(name).python_func
    Executor(executor_input=json.loads(executor_input), function_to_execute=body).execute()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--executor_input", required=True, help="JSON of the inputs and outputs of the task")
    parser.add_argument("--function_to_execute", required=True, help="name of the component")
    parsed, _ = parser.parse_known_args(arguments)
    run_component(parsed.function_to_execute, parsed.executor_input)


if __name__ == "__main__":
    main()
