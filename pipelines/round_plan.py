"""What is fixed when a pipeline is compiled, and the defaults of what can be changed for each run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clincot.config import Params
from clincot.deployment.service_settings import ServiceSettings
from clincot.pipelines.cluster_settings import ClusterSettings
from clincot.pipelines.params import encode_params
from clincot.pipelines.run_form import REQUIRED_FIELDS, split_sections
from clincot.training.launch_settings import LaunchSettings


@dataclass(frozen=True)
class RoundPlan:
    """What is fixed when a pipeline is compiled. `arguments` are defaults, which each run can change."""

    params: Params = field(default_factory=Params)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    service: ServiceSettings = field(default_factory=ServiceSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    data: str = ""
    benchmark: str = ""
    blind_from: str = ""
    shards: int = 1
    rounds: int = 1  # in one run
    deploys: bool = True
    number: int = 0  # of the first round; 0: the next round of the model
    target: str = "kserve"
    state: str = ""
    code: str = ""  # stands for the source in cache keys; empty: the image, which Kubeflow's own key contains

    @property
    def judges_apart(self) -> bool:
        """Whether judging is a task without an accelerator: all judges are endpoints, and no chain waits for them."""
        judges = self.params.judge.judges
        return bool(judges) and all(one.url for one in judges) and len(self.params.answer.steps) == 1

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters of the pipeline with their defaults. A required one has none unless the plan sets it."""
        fields, sections = split_sections(self.params)
        sections["service"] = self.service.model_dump(mode="json")
        sections["launch"] = self.launch.model_dump(mode="json")
        fields |= {
            "data": self.data,
            "benchmark": self.benchmark,
            "recipe": self.params.recipe.name,
            "blind_from": self.blind_from,
            "calibrated_on": "",
            "number": self.number,
            "shards": self.shards,
        }
        return {
            **{name: value for name, value in fields.items() if value or name not in REQUIRED_FIELDS},
            **{name: encode_params(content) for name, content in sections.items()},
        }
