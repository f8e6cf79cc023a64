"""Whose a pipeline or a recurring run is: names from the model line, and a note in the description.

Several model lines and several installations may share one Kubeflow Pipelines. Names in the UI are derived from the
model line. The name of a recurring run becomes the name of every workflow and pod it starts, which has to be short, so
a recurring run is recognized by a line of JSON at the end of its description.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

_MARK = "clincot: "
# Workflow: NAME, 5 random characters, "-", index, "-", 10 digits; pod: workflow, "-system-container-driver-", 10 digits
# (kubeflow/pipelines 2.17.0, backend/src/apiserver/template/template.go: toSWFCRDResourceGeneratedName and
# backend/src/crd/controller/scheduledworkflow/util/scheduled_workflow.go: NextResourceName). With 7 characters and an
# index of up to four digits, a driver's pod has 63 characters, the most that Kubernetes takes as a hostname.
RECURRING_NAME_CHARS = 7


@dataclass(frozen=True)
class Owner:
    """Who keeps a recurring run or a pipeline.

    store: address of the model store. installation: release of the chart; "" for a command that a person runs.
    """

    line: str = "clincot"
    store: str = ""
    installation: str = ""

    @property
    def pipeline_name(self) -> str:
        return f"{self.line}-round"

    @property
    def experiment_name(self) -> str:
        return self.line

    @property
    def recurring_name(self) -> str:
        return self.line[:RECURRING_NAME_CHARS].rstrip("-._")

    def replaces(self, other: Owner) -> bool:
        """Return whether a recurring run of `other` is replaced by one of this owner.

        An installation replaces its own, also those of the name that its line had before. Otherwise, both have to keep
        the same model line of the same store. Two installations may have stores of the same address behind different
        endpoints.
        """
        if self.installation and other.installation:
            return self.installation == other.installation
        return (self.line, self.store) == (other.line, other.store)

    def shares_pipeline(self, other: Owner) -> bool:
        """Return whether this owner may add versions to a pipeline of `other`."""
        if self.installation and other.installation:
            return self.installation == other.installation
        return self.line == other.line

    def __str__(self) -> str:
        store = f" in {self.store}" if self.store else ""
        installation = f" (installation {self.installation})" if self.installation else ""
        return f"the model line {self.line}{store}{installation}"


def write_description(text: str, owner: Owner, **more: str) -> str:
    """Return a description that ends in the owner and further values, for `read_description`."""
    return f"{text}\n{_MARK}{json.dumps({**asdict(owner), **more}, sort_keys=True)}"


def read_description(description: str | None) -> dict[str, str] | None:
    """Return the values that `write_description` wrote; None if the description has none."""
    _, found, content = (description or "").rpartition(_MARK)
    if not found:
        return None
    try:
        values = json.loads(content)
    except ValueError:
        return None
    return {str(name): str(value) for name, value in values.items()} if isinstance(values, dict) else None


def read_owner(description: str | None) -> Owner | None:
    """Return the owner that a description names; None if it names none."""
    values = read_description(description)
    if values is None or "line" not in values:
        return None
    return Owner(values["line"], values.get("store", ""), values.get("installation", ""))


def find_owner(spec: Any, arguments: Any = None) -> Owner | None:
    """Return the model line and store that a compiled pipeline works on; None if it is no round pipeline.

    spec: the pipeline spec, alone or with the platform spec, as the API returns it. arguments: those of a run, which
    replace the defaults of the spec.
    """
    if not isinstance(spec, dict):
        return None
    spec = spec.get("pipeline_spec", spec)
    inputs = spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    values = {name: one.get("defaultValue") for name, one in inputs.items()} | dict(arguments or {})
    publish = values.get("publish")
    if not isinstance(publish, dict):
        return None
    # parameters of their own, or in the section `publish`, where earlier releases had them
    line, store = values.get("model") or publish.get("name"), values.get("store") or publish.get("store")
    return Owner(str(line or Owner.line), str(store or ""))
