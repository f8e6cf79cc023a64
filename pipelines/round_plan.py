"""What is fixed when a pipeline is compiled, and the defaults of what can be changed for each run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clincot.config import Params
from clincot.config.sections import INHERITED_BY_PREFLIGHT, PREFLIGHT_ADDRESSES
from clincot.deployment.service_settings import ServiceSettings
from clincot.pipelines.cluster_settings import ClusterSettings
from clincot.pipelines.params import encode_params
from clincot.training.launch_settings import LaunchSettings

SECTIONS = (
    "preflight",
    "prepare",
    "propose",
    "answer",
    "judge",
    "pair",
    "version",
    "train",
    "evaluate",
    "decide",
    "publish",
    "deploy",
)


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
    image: str = ""  # stands for the code in cache keys; empty: the images of the cluster settings

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters of the pipeline with their defaults."""
        sections = {name: self.params.get_stage_config(name).model_dump(mode="json") for name in SECTIONS}
        # preflight checks the sections and the data sets of the round, not its own copies
        for name in (*INHERITED_BY_PREFLIGHT, *PREFLIGHT_ADDRESSES):
            del sections["preflight"][name]
        sections["service"] = self.service.model_dump(mode="json")
        sections["launch"] = self.launch.model_dump(mode="json")
        return {
            "recipe": self.params.recipe.name,
            "data": self.data,
            "benchmark": self.benchmark,
            "blind_from": self.blind_from,
            "calibrated_on": "",
            "number": self.number,
            "shards": self.shards,
            **{name: encode_params(content) for name, content in sections.items()},
        }

    def cache_image(self, task: str) -> str:
        """Return what stands for the code of a task in its cache key."""
        return self.image or self.cluster.select_image(task)
