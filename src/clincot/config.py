"""Configuration: one frozen section a stage. params.yaml holds the defaults a researcher sweeps.

Unknown keys are refused; every field says what it does and, where its default is not obvious, where it is from.
Sources: [ClinCoT] arXiv 2603.01124, [UV-CoT] arXiv 2504.18397, [MMedPO] arXiv 2412.06141, [ODPO] arXiv 2402.10571.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from clincot.fields import PositiveInt
from clincot.jsonl import InvalidRecord, format_validation_error
from clincot.records import hash_json

Share = Annotated[float, Field(ge=0, le=1)]
_MODEL_NAME_PATTERN = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"  # also the name of a Kubernetes service, with suffixes
GrounderName = Literal["windows", "relevance", "written", "http", "random"]


class FrozenConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def digest(self) -> str:
        return hash_json(self.model_dump(mode="json"))

    @property
    def files(self) -> tuple[Path, ...]:
        """Files and folders that the section names: what is in them decides a stage's result too."""
        return ()


class PrepareConfig(FrozenConfig):
    """Which questions this round asks: X_1 … X_m are disjoint, split by image [ClinCoT]."""

    rounds: Annotated[
        PositiveInt, Field(description="m, into how many disjoint subsets the questions are split [ClinCoT: 4]")
    ] = 4
    round: Annotated[int, Field(ge=0, description="which subset (0-based) this round takes")] = 0
    limit: Annotated[int, Field(ge=0, description="at most so many questions; 0: all of the subset")] = 0
    seed: Annotated[int, Field(description="of the split")] = 0


class ProposeConfig(FrozenConfig):
    """From questions to regions."""

    grounders: Annotated[
        dict[GrounderName, PositiveInt],
        AfterValidator(lambda given: {name: given[name] for name in get_args(GrounderName) if name in given}),
        Field(description="how many regions each grounder gives a question; the whole image is always added"),
    ] = {"windows": 2, "written": 4}  # in one order, whatever the order of the keys: what comes first is kept of two
    hypotheses: Annotated[int, Field(ge=2, description="findings asked about a question, 'normal' included")] = 4
    window_sides: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(min_length=1, description="sides of the sliding windows, as shares of the image"),
    ] = (0.25, 0.5)
    window_stride: Annotated[float, Field(gt=0, le=1, description="step of a window, as a share of its side")] = 0.75
    merge_iou: Annotated[Share, Field(description="regions of a question that overlap more are one region")] = 0.7
    temperature: Annotated[float, Field(ge=0, description="of regions that the policy writes [UV-CoT: 0.7]")] = 1.0
    relevance_quantile: Annotated[Share, Field(description="threshold of a relevance map before masks are cut")] = 0.9
    http_url: Annotated[str, Field(description="endpoint of the 'http' grounder")] = ""
    seed: int = 0


class AnswerConfig(FrozenConfig):
    """From regions to candidates: one answer a region."""

    temperature: Annotated[float, Field(ge=0, description="of sampled answers [UV-CoT: 0.7]")] = 0.7
    max_new_tokens: Annotated[PositiveInt, Field(description="an answer that is longer is cut")] = 16
    report_max_new_tokens: Annotated[PositiveInt, Field(description="the same of a report")] = 160
    steps: Annotated[
        tuple[str, ...],
        Field(
            min_length=1,
            description="questions of a chain; {question} is the data set's. Several: the best is kept as context",
        ),
    ] = ("{question}",)
    batch_size: PositiveInt = 128
    seed: int = 0

    def get_max_tokens(self, kind: str) -> int:
        """The most tokens of an answer to a question of that kind."""
        return self.report_max_new_tokens if kind == "report" else self.max_new_tokens


class JudgeSpec(FrozenConfig):
    """One evaluator: a checkpoint in this process, or an OpenAI-compatible endpoint with log-probs."""

    name: Annotated[str, Field(min_length=1)]
    path: Annotated[str, Field(description="folder or hub name of a checkpoint")] = ""
    url: Annotated[str, Field(description="base URL of an endpoint, …/v1")] = ""
    model: Annotated[str, Field(description="model name at the endpoint")] = ""
    api_key_env: Annotated[str, Field(description="environment variable that holds the key")] = ""
    rating: Annotated[bool, Field(description="no log-probs there: let it write 'n/10' instead")] = False
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    weight: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _check_path_or_url(self) -> JudgeSpec:
        if bool(self.path) == bool(self.url):
            raise ValueError(f"judge {self.name!r} needs either path or url, not both and not neither")
        return self


class JudgeConfig(FrozenConfig):
    """The panel. Every judge scores every candidate."""

    judges: tuple[JudgeSpec, ...] = ()
    calibration: Annotated[Literal["identity", "platt", "isotonic"], Field(description="per judge")] = "platt"
    calibration_file: Annotated[str, Field(description="what `clincot calibrate` wrote; empty: identity")] = ""
    quorum: Annotated[PositiveInt, Field(description="judges that must have scored; fewer: the stage fails")] = 2
    retries: Annotated[int, Field(ge=0, description="of a judge that fails")] = 3
    retry_delay_s: Annotated[float, Field(ge=0, description="before the first retry; doubles each time")] = 1.0
    batch_size: PositiveInt = 128

    @property
    def files(self) -> tuple[Path, ...]:
        places = [*(spec.path for spec in self.judges), self.calibration_file]
        return tuple(Path(place) for place in places if place)


class PairConfig(FrozenConfig):
    """From scores to preference pairs."""

    min_gap: Annotated[float, Field(gt=0, description="least score gap of a pair")] = 0.3
    per_question: Annotated[PositiveInt, Field(description="k pairs kept a question [UV-CoT code: 2]")] = 2
    pick: Annotated[Literal["random", "top"], Field(description="random [ClinCoT] or the largest gaps")] = "random"
    gamma: Annotated[float, Field(ge=0, description="weight of the next step's score [UV-CoT]")] = 1.0
    same_region_share: Annotated[
        Share, Field(description="at most this share of pairs differ in the answer alone, from one region")
    ] = 0.5
    length_auc_tolerance: Annotated[
        float, Field(ge=0, le=0.5, description="'longer = rejected' may tell the sides apart by 0.5 ± this")
    ] = 0.05
    seed: int = 0


class VersionConfig(FrozenConfig):
    """Where a round's preference data is kept. No credentials stand here: see preferences/versions/git.py."""

    repository: Annotated[
        str, Field(description="git address of the data repository; empty: the round's data is kept as no version")
    ] = ""
    branch: Annotated[str, Field(description="empty: the repository's default branch")] = ""
    round: Annotated[
        int, Field(ge=0, description="number of the tag preferences/round-NNNN; 0: the next one that is free")
    ] = 0
    attempts: Annotated[PositiveInt, Field(description="pushes, where others push at the same time")] = 8
    timeout_s: Annotated[float, Field(gt=0, description="of one git or dvc command")] = 1800.0


class TrainConfig(FrozenConfig):
    """Margin-aware DPO, or SFT on the chosen answers. `recipe` sets the loss as a source has it."""

    recipe: Annotated[
        Literal["ours", "paper", "code"],
        Field(description="margin: ours λ·clip(gap/(τ+spread), 0, c); paper [UV-CoT]: g(s_w)-g(s_l); code: s_w-s_l"),
    ] = "ours"
    loss: Annotated[Literal["margin_dpo", "odpo", "sft"], Field(description="sft: on the chosen side only")] = (
        "margin_dpo"
    )
    beta: Annotated[float, Field(gt=0, description="strength of the reference [ClinCoT code: 0.1]")] = 0.1
    margin_lambda: Annotated[float, Field(ge=0, description="λ; 0 is plain DPO")] = 0.5
    margin_tau: Annotated[float, Field(gt=0, description="τ, in score units")] = 0.5
    margin_cap: Annotated[float, Field(gt=0, description="c, in logits before λ")] = 2.0
    odpo_alpha: Annotated[float, Field(ge=0, description="α of ODPO's α·log(gap)")] = 1.0
    nll_weight: Annotated[
        float, Field(ge=0, description="weight of the chosen side's NLL, the anchor, averaged over tokens and turns")
    ] = 0.2
    image_pair_weight: Annotated[
        float,
        Field(ge=0, description="weight of pairs whose rejected side sees a blanked crop [mDPO, MMedPO]"),
    ] = 0.0
    lr: Annotated[float, Field(gt=0, description="peak learning rate [1e-7 … 1e-5 for billions of parameters]")] = 1e-4
    epochs: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Annotated[PositiveInt, Field(description="pairs a step, over all devices together")] = 32
    grad_accumulation: PositiveInt = 1
    warmup_ratio: Share = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    freeze_vision: Annotated[bool, Field(description="the vision tower stays as it is, its features are reused")] = True
    lora_r: Annotated[int, Field(ge=0, description="0: full fine-tuning [MMedPO: 128]")] = 0
    lora_alpha: PositiveInt = 256
    dtype: Literal["float32", "bfloat16"] = "float32"
    save_steps: Annotated[int, Field(ge=0, description="a resumable checkpoint every n steps; 0: at the end only")] = 0
    seed: int = 0


class EvaluateConfig(FrozenConfig):
    """Which regions a policy looks at when it is measured, and how intervals are drawn."""

    arms: tuple[
        Literal["written", "windows", "relevance", "http", "random", "wrong", "oracle", "shuffled", "whole"], ...
    ] = (
        "written",
        "windows",
        "random",
        "oracle",
        "whole",
    )
    propose: Annotated[ProposeConfig, Field(description="settings of the grounders; `rounds` takes the round's")] = (
        ProposeConfig()
    )
    limit: Annotated[int, Field(ge=0, description="at most so many questions; 0: all")] = 0
    max_new_tokens: PositiveInt = 16
    report_max_new_tokens: Annotated[PositiveInt, Field(description="of the questions that ask for a report")] = 160
    resamples: Annotated[PositiveInt, Field(description="of the cluster bootstrap")] = 2000
    seed: int = 0

    def get_max_tokens(self, kind: str) -> int:
        """The most tokens of an answer to a question of that kind."""
        return self.report_max_new_tokens if kind == "report" else self.max_new_tokens


Floor = Annotated[float, Field(gt=0)] | None


class Floors(FrozenConfig):
    """How much worse than the champion's each guarded metric may be; a promotion shows that none is. null: no guard."""

    closed_accuracy: Floor = 0.05
    open_f1: Floor = 0.05  # token-set F1 of open questions
    hit_rate: Floor = 0.1  # of the regions looked at, where the key has boxes
    hallucination: Floor = 0.1  # absent findings called present
    abstention: Floor = 0.05  # answers that are empty, unreadable or say that they do not know
    answer_length: Floor = 3.0  # words

    @property
    def enabled(self) -> dict[str, float]:
        return {name: floor for name, floor in self.model_dump().items() if floor is not None}


class DecideConfig(FrozenConfig):
    """When the challenger takes the champion's place."""

    arm: str = "written"
    lifetime_error: Annotated[
        float,
        Field(
            gt=0,
            lt=0.5,
            description="probability of ever promoting wrongly, over all rounds [promotion/error_budget.py]",
        ),
    ] = 0.05
    min_gain: Annotated[float, Field(description="a promotion shows a gain in accuracy above this")] = 0.0
    floors: Annotated[
        Floors, Field(description="how much worse than the champion each guarded metric may be, at most (see Floors)")
    ] = Floors()
    max_off_format: Annotated[Share, Field(description="of the challenger's answers; more: it is kept out")] = 0.02
    max_unscored: Annotated[Share, Field(description="of either side's answers, or of the judges' candidates")] = 0.05
    slices: Annotated[
        PositiveInt, Field(description="the benchmark's patients are split into so many slices; decisions take turns")
    ] = 1
    max_uses: Annotated[
        PositiveInt, Field(description="decisions that a benchmark question may serve, then it is worn")
    ] = 20
    max_near_duplicates: Annotated[
        Share, Field(description="of the benchmark's images with a near-duplicate in training; more blocks, any warns")
    ] = 0.0
    min_alpha: Annotated[
        float, Field(le=1, description="the judges' agreement (Krippendorff) below which it blocks")
    ] = 0.1
    max_shift: Annotated[
        float,
        Field(gt=0, description="population stability index of the panel's scores to the last round's; more warns"),
    ] = 0.25
    length_auc_tolerance: Annotated[
        float, Field(ge=0, le=0.5, description="'longer = rejected' of the pairs may be 0.5 ± this; outside it blocks")
    ] = 0.05
    resamples: Annotated[PositiveInt, Field(description="of the intervals' cluster bootstrap")] = 2000
    seed: int = 0


class PublishConfig(FrozenConfig):
    """A checkpoint into the store, under a name of its own that is never used again."""

    store: Annotated[str, Field(description="folder or s3://bucket/prefix; S3 is configured by AWS_… variables")] = ""
    name: Annotated[
        str, Field(pattern=_MODEL_NAME_PATTERN, description="the model line: its checkpoints succeed one another")
    ] = "clincot"
    adapter: Annotated[
        Literal["merge", "keep"],
        Field(description="of a checkpoint trained as LoRA: merged into the base's weights, or the adapter alone"),
    ] = "merge"
    round: Annotated[
        int, Field(ge=0, description="of the checkpoint; 0: as recorded, or one after its published parent's")
    ] = 0
    golden: Annotated[
        int, Field(ge=0, description="questions kept with their answers and regions, for smoke tests")
    ] = 8
    licence: Annotated[str, Field(min_length=1, description="SPDX name; a derivative carries its base's")] = (
        "Apache-2.0"
    )


class DeployConfig(FrozenConfig):
    """From a published checkpoint to an endpoint. What decides a rollout; nothing secret stands here."""

    steps: Annotated[
        tuple[Annotated[int, Field(ge=1, le=100)], ...],
        Field(min_length=1, description="shares of the traffic in percent, rising, the last one 100"),
    ] = (10, 50, 100)
    step_s: Annotated[float, Field(ge=0, description="how long each share is watched")] = 60.0
    ready_s: Annotated[
        float, Field(gt=0, description="until the new revision must be ready; large models load long")
    ] = 1800.0
    poll_s: Annotated[float, Field(gt=0, description="between two looks at the cluster")] = 2.0
    request_s: Annotated[float, Field(gt=0, description="deadline of one smoke request")] = 60.0
    max_error_rate: Annotated[Share, Field(description="share of the new revision's requests that may fail")] = 0.02
    smoke_iou: Annotated[Share, Field(description="a golden region is met from this IoU on")] = 0.5
    smoke_misses: Annotated[int, Field(ge=0, description="golden questions that may be answered otherwise")] = 0
    approval: Annotated[bool, Field(description="wait for `clincot approve` before anything is started")] = False

    @model_validator(mode="after")
    def _check_traffic_steps(self) -> DeployConfig:
        if list(self.steps) != sorted(set(self.steps)) or self.steps[-1] != 100:
            raise ValueError(f"deploy.steps must rise and end at 100, got {self.steps}")
        return self


class PreflightConfig(FrozenConfig):
    """What is looked at before a round asks for a GPU. The round's own judges, store and data repository are looked at:
    `judge`, `publish` and `version` are filled in by Params.section_of, and are not set here."""

    base: Annotated[
        str,
        Field(
            description="what a line without a champion starts from, as round 0: a checkpoint's folder, or the "
            "beginning of the digest of a published one"
        ),
    ] = ""
    cluster: Annotated[
        Literal["auto", "yes", "no"],
        Field(description="look at KServe and permissions? auto: in a pod, or where KUBECONFIG is set"),
    ] = "auto"
    namespace: Annotated[str, Field(description="of the rollout; empty: as the input `service` says")] = ""
    free_gb: Annotated[float, Field(ge=0, description="free space of the work folder and of TMPDIR, 10^9 bytes")] = 5.0
    timeout_s: Annotated[float, Field(gt=0, description="of each check; one that hangs has failed")] = 60.0
    verify_s: Annotated[float, Field(gt=0, description="of reading the champion's files again; 15 GB take minutes")] = (
        900.0
    )
    judge: JudgeConfig = JudgeConfig()
    publish: PublishConfig = PublishConfig()
    version: VersionConfig = VersionConfig()


class Params(FrozenConfig):
    """params.yaml, whole."""

    preflight: PreflightConfig = PreflightConfig()
    prepare: PrepareConfig = PrepareConfig()
    propose: ProposeConfig = ProposeConfig()
    answer: AnswerConfig = AnswerConfig()
    judge: JudgeConfig = JudgeConfig()
    pair: PairConfig = PairConfig()
    version: VersionConfig = VersionConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    decide: DecideConfig = DecideConfig()
    publish: PublishConfig = PublishConfig()
    deploy: DeployConfig = DeployConfig()

    @model_validator(mode="after")
    def _check_preflight_inherits(self) -> Params:
        for name in ("judge", "publish", "version"):
            if getattr(self.preflight, name) != getattr(PreflightConfig(), name):
                raise ValueError(f"preflight.{name} is the round's own; set {name} instead")
        return self

    def get_stage_config(self, stage: str) -> FrozenConfig:
        """The stage's section; preflight's with the judges, the store and the data repository that it looks at."""
        section: FrozenConfig = getattr(self, stage)
        if isinstance(section, PreflightConfig):
            return section.model_copy(update={"judge": self.judge, "publish": self.publish, "version": self.version})
        return section


S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class Recipe:
    """A named set of parameters."""

    name: str
    about: str
    path: Path
    values: dict[str, Any]
    digest: str


def list_recipes() -> list[Recipe]:
    """The recipes that come with the package, sorted by name."""
    return []


def find_recipe(name_or_path: str | Path) -> Recipe:
    """Return the shipped recipe of a name, or read the one in a file."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        raise InvalidRecord(f"no recipe is called {str(name_or_path)!r}; the shipped recipes are: none")
    values = read_settings(path, "a recipe: `recipe: {name, about}` and parameters by section")
    head = values.pop("recipe")
    return Recipe(name=head["name"], about=head["about"], path=path, values=values, digest=hash_json(values))


def render_params(params: Params) -> str:
    """The parameters as YAML, each section under its name."""
    return yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False)


def load_params(path: Path | None, overrides: Sequence[str] = (), recipe: str = "") -> Params:
    """params.yaml with `section.field=value` overrides; unknown keys and wrong values are refused by name."""
    content: dict[str, Any] = dict(find_recipe(recipe).values) if recipe else {}
    if path is not None:
        for section, values in read_settings(path, "the parameters (params.yaml)", "parameters by section").items():
            content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
    for override in overrides:
        name, equals, value = override.partition("=")
        keys = name.split(".")
        if not equals or len(keys) < 2:
            raise InvalidRecord(f"--set {override!r}: expected section.field=value, for instance train.lr=1e-5")
        place = content
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise InvalidRecord(f"--set {override!r}: {key!r} is not a section")
        place[keys[-1]] = parse_override_value(value, where=f"--set {override!r}")
    return parse_config(Params, content, where=str(path or "parameters"))


def read_settings(path: Path, expected: str, shape: str = "settings by name") -> dict[str, Any]:
    """What a YAML file of settings holds; raises BadRecord where it is not there or holds something else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise InvalidRecord(f"{path}: no such file; expected {expected}") from None
    except yaml.YAMLError as error:
        raise InvalidRecord(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise InvalidRecord(f"{path}: expected {shape}, got a {type(content).__name__}")
    return content


def parse_config(kind: type[S], content: dict[str, Any], *, where: str) -> S:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InvalidRecord(f"{where}: {format_validation_error(error)}") from None


def parse_override_value(value: str, *, where: str) -> Any:
    """A value as written on the command line. YAML reads 1e-5 as text (YAML 1.1 wants 1.0e-5); here it is a number."""
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InvalidRecord(f"{where}: the value is not YAML: {error}") from None
    if isinstance(parsed, str):
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed
