"""Parameters of a round: typed sections, the recipes that fill them, and how both are read.

sections.py       the sections with neutral defaults; every field is described, with its source where it has one
recipes.py        named, complete sets of values for a kind of model and data (recipes/*.yaml)
loading.py        neutral defaults < recipe < params file < --set
params_yaml.py    parameters as YAML with the descriptions as comments
shipped.py        files that come with the package: `shipped:policy`
settings_file.py  reading any settings file, with errors that name the key
server_settings.py  settings of `clincot serve`, which a deployment passes to its servers

The public names are those below: import them from `clincot.config`.
"""

from clincot.config.loading import load_params
from clincot.config.params_yaml import render_params
from clincot.config.recipes import PolicyFacts, Recipe, find_recipe, list_recipes
from clincot.config.sections import (
    SECTION_NAMES,
    AnswerConfig,
    DecideConfig,
    DeployConfig,
    EngineConfig,
    EvaluateConfig,
    Floors,
    FrozenConfig,
    GrounderName,
    JudgeConfig,
    JudgeSpec,
    PairConfig,
    Params,
    PreflightConfig,
    PrepareConfig,
    ProposeConfig,
    PublishConfig,
    RecipeReference,
    ServeConfig,
    Share,
    TrackingConfig,
    TrainConfig,
    VersionConfig,
    VllmConfig,
)
from clincot.config.settings_file import parse_config, parse_override_value, read_settings
from clincot.config.shipped import is_shipped, resolve_path

__all__ = [
    "SECTION_NAMES",
    "AnswerConfig",
    "DecideConfig",
    "DeployConfig",
    "EngineConfig",
    "EvaluateConfig",
    "Floors",
    "FrozenConfig",
    "GrounderName",
    "JudgeConfig",
    "JudgeSpec",
    "PairConfig",
    "Params",
    "PolicyFacts",
    "PreflightConfig",
    "PrepareConfig",
    "ProposeConfig",
    "PublishConfig",
    "Recipe",
    "RecipeReference",
    "ServeConfig",
    "Share",
    "TrackingConfig",
    "TrainConfig",
    "VersionConfig",
    "VllmConfig",
    "find_recipe",
    "is_shipped",
    "list_recipes",
    "load_params",
    "parse_config",
    "parse_override_value",
    "read_settings",
    "render_params",
    "resolve_path",
]
