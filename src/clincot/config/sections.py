"""The sections of parameters, one a stage, with neutral defaults.

Neutral defaults suit models of billions of parameters as far as a source says anything about them; what another model
or data set needs is a recipe (recipes/*.yaml). Unknown keys are refused.
Sources: [ClinCoT] arXiv 2603.01124, [UV-CoT] arXiv 2504.18397, [MMedPO] arXiv 2412.06141, [ODPO] arXiv 2402.10571,
[mDPO] arXiv 2406.11839, [LLaVA] arXiv 2310.03744, [QLoRA] arXiv 2305.14314.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from clincot.config.shipped import resolve_path
from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, PositiveInt
from clincot.geometry import Surroundings
from clincot.records import hash_json

Share = Annotated[float, Field(ge=0, le=1)]
# YAML reads an empty value as null; here it is the empty text.
OptionalText = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
_MODEL_NAME_PATTERN = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"  # also the name of a Kubernetes service, with suffixes
GrounderName = Literal["windows", "relevance", "written", "http", "random"]
InferenceDtype = Literal["auto", "float32", "bfloat16", "float16"]
StageDtype = Literal["inherit", "auto", "float32", "bfloat16", "float16"]
EngineName = Literal["transformers", "vllm", "url"]
RolloutStage = Literal["propose", "answer", "judge", "evaluate"]


def _sort_grounders(grounders: dict[GrounderName, int]) -> dict[GrounderName, int]:
    """One order, whatever the order of the keys: of two overlapping regions the first grounder's is kept."""
    return {name: grounders[name] for name in get_args(GrounderName) if name in grounders}


def _undo_yaml_boolean(value: Any) -> Any:
    """YAML 1.1 reads the words yes and no as true and false."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _undo_yaml_off(value: Any) -> Any:
    """YAML 1.1 reads the word off as false."""
    return "off" if value is False else value


class FrozenConfig(BaseModel):
    """Base of all settings: immutable, and it refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def digest(self) -> str:
        return hash_json(self.model_dump(mode="json"))

    @property
    def named_paths(self) -> tuple[str, ...]:
        """Paths of files and folders that the section names, as written. Their content decides a stage's result too."""
        return ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The same files and folders, resolved."""
        return tuple(resolve_path(path) for path in self.named_paths)


class VllmConfig(FrozenConfig):
    """The vLLM server that a stage starts in its own pod, on 127.0.0.1."""

    gpu_memory_utilization: float = Field(
        default=0.85, gt=0, le=1, description="Share of a GPU's memory; judges that run at the same time divide it."
    )
    cpu_kv_gb: PositiveInt = Field(default=2, description="Memory for keys and values on a CPU, in GiB.")
    max_model_len: int = Field(
        default=0, ge=0, description="Longest prompt with its answer, in tokens; 0: what the checkpoint was made for."
    )
    max_images: PositiveInt = Field(default=8, description="Most pictures in one prompt.")
    concurrency: PositiveInt = Field(default=32, description="Requests in flight at the same time.")
    start_s: float = Field(default=1800.0, gt=0, description="Seconds until the server must be ready.")
    request_s: float = Field(default=600.0, gt=0, description="Deadline of one request, in seconds.")


class EngineConfig(FrozenConfig):
    """What runs the models of one stage; Params.get_stage_config fills it in from `models`."""

    kind: EngineName = Field(default="transformers", description="In this process, a vLLM server here, or a URL.")
    url: OptionalText = Field(
        default="", pattern=r"^(https?://\S+)?$", description="Base URL of the policy's endpoint, ending in /v1."
    )
    model: OptionalText = Field(default="", description="Name of the policy at the endpoint.")
    api_key_env: OptionalText = Field(default="", description="Environment variable that holds the endpoint's key.")
    vllm: VllmConfig = Field(default=VllmConfig(), description="Settings of the vLLM server.")

    @model_validator(mode="after")
    def _check_url(self) -> EngineConfig:
        if self.kind == "url" and not self.url:
            raise ValueError("the engine url needs an address: set models.url to the endpoint's base URL (…/v1)")
        return self


def _is_default_engine(engine: EngineConfig) -> bool:
    """The engine `transformers` is left out of a section's content, so that its digests are those of earlier runs."""
    return engine == EngineConfig()


StageEngine = Annotated[
    EngineConfig, Field(description="Engine of the stage, from models.", exclude_if=_is_default_engine)
]


class PrepareConfig(FrozenConfig):
    """Which questions a round asks: disjoint subsets X_1 … X_m, split by image [ClinCoT]."""

    rounds: PositiveInt = Field(
        default=4, description="m, the number of disjoint subsets into which the questions are split [ClinCoT: 4]."
    )
    round: int = Field(default=0, ge=0, description="Subset (0-based) of this round.")
    limit: int = Field(default=0, ge=0, description="Maximum number of questions; 0: the whole subset.")
    seed: int = Field(default=0, description="Seed of the split.")


class ProposeConfig(FrozenConfig):
    """How regions are proposed for a question."""

    grounders: Annotated[
        dict[GrounderName, PositiveInt],
        AfterValidator(_sort_grounders),
        Field(description="Regions per question from each grounder; the whole image is always added."),
    ] = {"windows": 2, "written": 4}
    hypotheses: int = Field(default=4, ge=2, description="Findings asked about each question, 'normal' included.")
    window_sides: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.25, 0.5), min_length=1, description="Sides of the sliding windows, as shares of the image."
    )
    window_stride: float = Field(
        default=0.75, gt=0, le=1, description="Step between windows, as a share of their side."
    )
    window_looks: int = Field(
        default=0,
        ge=0,
        exclude_if=lambda looks: looks == 0,  # records of versions without this field keep their digests
        description="Most windows asked about for a finding, coarse to fine, which costs hits; 0: all of them.",
    )
    merge_iou: Share = Field(default=0.7, description="Regions of a question that overlap more (IoU) are merged.")
    temperature: float = Field(
        default=1.0, ge=0, description="Sampling temperature of regions that the policy writes [UV-CoT: 0.7]."
    )
    relevance_quantile: Share = Field(default=0.9, description="Quantile at which a relevance map is cut into masks.")
    http_url: OptionalText = Field(default="", description="Endpoint of the 'http' grounder.")
    http_protocol: Literal["regions", "kserve-v2"] = Field(
        default="regions",
        description="Protocol of that endpoint: regions, one POST of JSON; kserve-v2, the Open Inference Protocol of "
        "KServe and Triton, below whose address the model is.",
        exclude_if=lambda value: value == "regions",
    )
    http_model: OptionalText = Field(
        default="", description="Name of the model, for kserve-v2.", exclude_if=lambda value: not value
    )
    http_prompt: str = Field(
        default="{finding}",
        pattern=r"\{finding\}",
        description="What a segmenter is prompted with for a hypothesis; {modality} is that of the image.",
        exclude_if=lambda value: value == "{finding}",
    )
    http_api_key_env: OptionalText = Field(
        default="",
        description="Environment variable that holds the endpoint's key.",
        exclude_if=lambda value: not value,
    )
    mask_outside: Surroundings = Field(
        default="shown",
        description="What the crop of a region with a mask shows outside the mask: shown, the image; dimmed, the image "
        "darkened; blank, black.",
        exclude_if=lambda value: value == "shown",
    )
    seed: int = Field(default=0, description="Seed of sampled and random regions.")
    dtype: StageDtype = Field(default="inherit", description="Number type of the policy; inherit: models.dtype.")
    engine: StageEngine = EngineConfig()

    @model_validator(mode="after")
    def _check_model_name(self) -> ProposeConfig:
        if (self.http_protocol == "kserve-v2") != bool(self.http_model):
            raise ValueError(
                f"http_protocol kserve-v2 and http_model belong together, got {self.http_protocol!r} and "
                f"{self.http_model!r}"
            )
        return self


class AnswerConfig(FrozenConfig):
    """How the policy answers: `per_region` candidates from every region."""

    per_region: PositiveInt = Field(
        default=1,
        description="Answers sampled from each region in a chain's first step; with 2, pairs may differ in them alone.",
    )

    temperature: float = Field(default=0.7, ge=0, description="Sampling temperature of answers [UV-CoT: 0.7].")
    max_new_tokens: PositiveInt = Field(default=16, description="Maximum length of an answer; a longer one is cut.")
    report_max_new_tokens: PositiveInt = Field(
        default=160, description="Maximum length of a report; a longer one is cut."
    )
    steps: tuple[str, ...] = Field(
        default=("{question}",),
        min_length=1,
        description="Questions of a chain; {question} is the data set's. The best answer of a step becomes context.",
    )
    continue_from: Literal["own", "all"] = Field(
        default="own",
        description="Regions from which the next step continues candidates other than the best: own, each from its own "
        "region; all, from every region, n^2 answers a step, so that gamma credits a look for what is seen elsewhere.",
        exclude_if=lambda value: value == "own",
    )
    batch_size: PositiveInt = Field(default=128, description="Answers generated in one batch.")
    seed: int = Field(default=0, description="Seed of sampled answers.")
    dtype: StageDtype = Field(default="inherit", description="Number type of the policy; inherit: models.dtype.")
    engine: StageEngine = EngineConfig()

    @model_validator(mode="after")
    def _check_samples(self) -> AnswerConfig:
        if self.per_region > 1 and self.temperature == 0:
            raise ValueError(
                f"per_region {self.per_region} with temperature 0 gives the same answer {self.per_region} times; "
                "set a temperature above 0, or per_region: 1"
            )
        return self

    def get_max_tokens(self, kind: str) -> int:
        """Maximum number of tokens of an answer to a question of that kind."""
        return self.report_max_new_tokens if kind == "report" else self.max_new_tokens


class ServeConfig(FrozenConfig):
    """How a server answers: the regions that it looks at, the length of an answer, when it abstains.

    The benchmark's arm `served`, the golden questions and the deployed server all take these settings, so that the gate
    measures what clients get.
    """

    propose: ProposeConfig = Field(
        default=ProposeConfig(grounders={"windows": 2, "written": 1}, temperature=0.0),
        description="The regions that an answer is derived from; the whole image is always added.",
    )
    max_new_tokens: PositiveInt = Field(default=16, description="Longest answer from one region, in tokens.")
    abstain_below: Share = Field(
        default=0.0,
        description="Confidence below which an answer abstains; 0: never. It depends on the checkpoint.",
    )
    max_images: PositiveInt = Field(
        default=1,
        description="Most images of a served question: the one that it is about, and others as context, such as a "
        "prior. Rounds and benchmarks show one, so their results hold for one.",
        exclude_if=lambda value: value == 1,
    )

    @property
    def answer_digest(self) -> str:
        """Hash of what decides the answer; abstaining withholds an answer and does not change it."""
        return hash_json({"propose": self.propose.model_dump(mode="json"), "max_new_tokens": self.max_new_tokens})[:20]


class JudgeSpec(FrozenConfig):
    """One judge: a checkpoint in this process, or an OpenAI-compatible endpoint that returns log-probabilities."""

    name: str = Field(min_length=1, description="Name of the judge; unique in the panel.")
    path: OptionalText = Field(default="", description="Checkpoint: folder, shipped:NAME or hub name.")
    url: OptionalText = Field(default="", description="Base URL of an endpoint, ending in /v1.")
    model: OptionalText = Field(default="", description="Name of the model at the endpoint.")
    api_key_env: OptionalText = Field(default="", description="Environment variable that holds the API key.")
    api_key_header: Literal["authorization", "api-key"] = Field(
        default="authorization", description="Header of the API key: a bearer token, or api-key [Azure OpenAI]."
    )
    api_version: OptionalText = Field(default="", description="Query api-version of every request [Azure OpenAI].")
    text_only: bool = Field(
        default=False, description="A language model without image input; it judges the text of question and answer."
    )
    prompt: Literal["yes_no", "rubric"] = Field(
        default="yes_no", description="Ask for yes or no, or for n/10 along a rubric (endpoints)."
    )
    rating: bool = Field(default=False, description="Ask for 'n/10' instead of reading log-probabilities.")
    thinking: Annotated[Literal["default", "off", "skip"], BeforeValidator(_undo_yaml_off)] = Field(
        default="default",
        description="Thinking block: off asks the chat template for none; skip reads the answer after it (endpoints).",
    )
    max_thinking_tokens: PositiveInt = Field(default=2048, description="Longest thinking block that is skipped.")
    temperature: float = Field(
        default=0.0, ge=0, description="0, or 1 for an endpoint that scales its log-probabilities by the temperature."
    )
    timeout_s: float = Field(default=60.0, gt=0, description="Deadline of one request, in seconds.")
    concurrency: PositiveInt = Field(
        default=8, description="Most requests in flight; fewer while many are answered with 429 (endpoints)."
    )
    weight: float = Field(default=1.0, gt=0, description="Weight in the panel's mean.")

    @property
    def checkpoint(self) -> str:
        """The path with `shipped:` resolved; empty for an endpoint."""
        return self.path and (self.path if "://" in self.path else str(resolve_path(self.path)))

    @model_validator(mode="after")
    def _check_path_or_url(self) -> JudgeSpec:
        if bool(self.path) == bool(self.url):
            raise ValueError(f"judge {self.name!r} needs either path or url, not both and not neither")
        if self.rating and self.prompt == "rubric":
            raise ValueError(f"judge {self.name!r}: rating and prompt: rubric exclude each other; set one of them")
        if self.path and (self.prompt == "rubric" or self.thinking == "skip"):
            raise ValueError(
                f"judge {self.name!r}: prompt: rubric and thinking: skip need an endpoint (url); in this process a "
                "judge's P(yes) is read from the first token"
            )
        if self.path and self.thinking == "off" and not self.text_only:
            raise ValueError(f"judge {self.name!r}: in this process thinking: off is for text_only judges")
        return self


class JudgeConfig(FrozenConfig):
    """The panel of judges; every judge scores every candidate."""

    judges: tuple[JudgeSpec, ...] = Field(
        default=(),
        description="Checkpoints in this process (path) or OpenAI-compatible endpoints (url, model, api_key_env).",
    )
    calibration: Literal["identity", "platt", "isotonic"] = Field(
        default="platt", description="Method by which each judge's probabilities were calibrated."
    )
    calibration_file: OptionalText = Field(
        default="", description="File written by `clincot calibrate`; empty: raw probabilities."
    )
    quorum: PositiveInt = Field(
        default=2, description="Judges that must score a candidate; with fewer the stage fails."
    )
    retries: int = Field(
        default=5,
        ge=0,
        description="Retries of a request that fails while its endpoint is up, or of a judge in this process.",
    )
    retry_delay_s: float = Field(default=1.0, ge=0, description="Seconds before the first retry; doubles each time.")
    max_failures: Share = Field(
        default=0.2, description="Share of a judge's requests that may fail; with more the judge is excluded."
    )
    show_reference: bool = Field(
        default=False, description="Show text_only judges the reference answer; `clincot calibrate` only, not rounds."
    )
    batch_size: PositiveInt = Field(default=128, description="Candidates judged in one batch.")
    dtype: StageDtype = Field(
        default="inherit", description="Number type of judges in this process; inherit: models.dtype."
    )
    engine: StageEngine = EngineConfig()

    @property
    def named_paths(self) -> tuple[str, ...]:
        paths = [spec.path for spec in self.judges]
        return tuple(path for path in (*paths, self.calibration_file) if path)

    @property
    def calibration_path(self) -> Path | None:
        """Where the calibration is; None: raw probabilities."""
        return resolve_path(self.calibration_file) if self.calibration_file else None


class PairConfig(FrozenConfig):
    """How scored candidates become preference pairs."""

    min_gap: float = Field(default=0.3, gt=0, description="Smallest score gap of a pair, in calibrated probability.")
    min_agreement: Share = Field(
        default=0.0,
        description="Smallest correlation of the judges on a group of answers that makes pairs; 0: all make pairs.",
    )
    max_prejudice: Share = Field(
        default=1.0,
        description="With min_agreement: largest share of the judges' preferences that the text alone explains.",
    )
    agreement_by: Literal["topic", "grounder"] = Field(
        default="topic",
        description="With min_agreement: the groups, topics or each topic from each grounder's regions.",
    )
    per_question: PositiveInt = Field(default=2, description="k, pairs kept per question [UV-CoT code: 2].")
    pick: Literal["random", "top"] = Field(
        default="random", description="Which pairs are kept: random [ClinCoT] or top gaps."
    )
    gamma: float = Field(default=1.0, ge=0, description="Weight of the next step's score in a chain [UV-CoT].")
    same_region_share: Share = Field(
        default=0.5,
        description="Maximum share of pairs whose sides come from the same region and differ in the answer only.",
    )
    max_answer_bias: Share = Field(
        default=1.0,
        description="Largest (chosen - rejected) / (chosen + rejected) of an answer in a topic's pairs; 1: any.",
    )
    length_auc_tolerance: float = Field(
        default=0.05,
        ge=0,
        le=0.5,
        description="'Longer is rejected' may tell the sides apart with an AUC of 0.5 ± this; outside it blocks.",
    )
    seed: int = Field(default=0, description="Seed of the random choice.")


class VersionConfig(FrozenConfig):
    """Where a round's preference data is versioned. Credentials come from elsewhere (preferences/versions/git.py)."""

    repository: OptionalText = Field(
        default="", description="Git address of the data repository; empty: no version is kept."
    )
    branch: OptionalText = Field(default="", description="Branch; empty: the repository's default branch.")
    round: int = Field(
        default=0, ge=0, description="Number in the tag of the version; 0: that of the round, or the next free one."
    )
    attempts: PositiveInt = Field(default=8, description="Attempts to push while others push at the same time.")
    timeout_s: float = Field(default=1800.0, gt=0, description="Deadline of one git or dvc command, in seconds.")


class TrainConfig(FrozenConfig):
    """Margin-aware DPO, or SFT on the chosen answers."""

    recipe: Literal["ours", "paper", "code"] = Field(
        default="ours",
        description="Margin: ours is λ·clip(gap/(τ+spread), 0, c); paper is g(s_w)-g(s_l) [UV-CoT]; code is s_w-s_l.",
    )
    loss: Literal["margin_dpo", "odpo", "sft"] = Field(
        default="margin_dpo", description="Loss; sft trains on the chosen side only."
    )
    beta: float = Field(default=0.1, gt=0, description="β, strength of the reference [ClinCoT code: 0.1].")
    margin_lambda: float = Field(default=0.5, ge=0, description="λ, weight of the margin; 0 is plain DPO.")
    margin_tau: float = Field(default=0.5, gt=0, description="τ, in units of the score.")
    margin_cap: float = Field(default=2.0, gt=0, description="c, upper bound of the margin in logits, before λ.")
    odpo_alpha: float = Field(default=1.0, ge=0, description="α of the margin α·log(1 + gap/τ) of `loss: odpo` [ODPO].")
    nll_weight: float = Field(
        default=0.2, ge=0, description="Weight of the chosen side's NLL (the anchor), averaged over tokens and turns."
    )
    anchors: int = Field(
        default=0,
        ge=0,
        description="Also train on this many of the policy's own answers to each question without a pair, by the NLL "
        "alone, each from another region.",
    )
    image_pair_weight: float = Field(
        default=0.0, ge=0, description="Weight of pairs whose rejected side sees a blanked crop [mDPO, MMedPO]."
    )
    lr: float = Field(
        default=1e-4, gt=0, description="Peak learning rate [1e-7 … 1e-5 for billions of parameters, MMedPO]."
    )
    epochs: float = Field(default=1.0, gt=0, description="Passes over the pairs.")
    batch_size: PositiveInt = Field(default=32, description="Pairs per step, over all devices together.")
    grad_accumulation: PositiveInt = Field(
        default=1, description="Parts into which a step's batch is split to save memory."
    )
    warmup_ratio: Share = Field(default=0.1, description="Share of the steps in which the learning rate rises.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    freeze_vision: bool = Field(default=True, description="Keep the vision tower fixed and reuse its features.")
    train_projector: bool = Field(
        default=True, description="Train the projector between vision tower and language model too [LLaVA, MMedPO]."
    )
    projector_lr: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate of the projector; null: lr, or 2e-5 where LoRA is chosen by size [MMedPO].",
    )
    full_finetuning: bool = Field(
        default=False,
        description="Train all weights of a model above 1e9 parameters too, where LoRA is the default [ClinCoT code].",
    )
    lora_r: int = Field(
        default=0, ge=0, description="Rank of LoRA; 0: none up to 1e9 parameters, 128 above [MMedPO: 128]."
    )
    lora_alpha: PositiveInt = Field(default=256, description="α of LoRA [MMedPO: 256].")
    quantization: Literal["none", "4bit"] = Field(
        default="none", description="Frozen weights under a LoRA; 4bit [QLoRA] is refused, since it cannot be merged."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Type of weights and activations; auto: bfloat16 on a GPU that has it, float32 elsewhere.",
    )
    save_steps: int = Field(default=0, ge=0, description="Steps between resumable checkpoints; 0: only at the end.")
    report_to: tuple[Literal["mlflow", "tensorboard", "wandb"], ...] = Field(
        default=(),
        description="Trackers that get the metrics of every step; their packages and environment variables say where.",
    )
    seed: int = Field(default=0, description="Seed of the order of pairs.")

    @model_validator(mode="after")
    def _check_method(self) -> TrainConfig:
        if self.full_finetuning and (self.lora_r or self.quantization != "none"):
            raise ValueError(
                f"full_finetuning trains all weights; set lora_r: 0 and quantization: none, got lora_r: {self.lora_r} "
                f"and quantization: {self.quantization}"
            )
        return self


class EvaluateConfig(FrozenConfig):
    """How a policy is measured on the benchmark, and how intervals are computed."""

    arms: tuple[
        Literal["served", "written", "windows", "relevance", "http", "random", "wrong", "oracle", "shuffled", "whole"],
        ...,
    ] = Field(
        default=("written", "windows", "random", "oracle", "whole"),
        description="Kinds of regions that the policy answers from; served answers as a server does; random, wrong, "
        "shuffled and whole are controls.",
    )
    propose: ProposeConfig = Field(
        default=ProposeConfig(), description="Settings of the grounders; `clincot rounds` takes those of the round."
    )
    serve: ServeConfig = Field(default=ServeConfig(), description="Settings of the arm served; those of `serve`.")
    open_judges: tuple[JudgeSpec, ...] = Field(
        default=(),
        description="Judges (text_only) that grade open answers with the reference at hand; never those of the round.",
    )
    limit: int = Field(default=0, ge=0, description="Maximum number of questions; 0: all.")
    max_new_tokens: PositiveInt = Field(default=16, description="Maximum length of an answer.")
    report_max_new_tokens: PositiveInt = Field(default=160, description="Maximum length of a report.")
    resamples: PositiveInt = Field(default=2000, description="Resamples of the cluster bootstrap.")
    seed: int = Field(default=0, description="Seed of the bootstrap and of random regions.")
    dtype: StageDtype = Field(default="inherit", description="Number type of the policy; inherit: models.dtype.")
    engine: StageEngine = EngineConfig()

    def get_max_tokens(self, kind: str) -> int:
        """Maximum number of tokens of an answer to a question of that kind."""
        return self.report_max_new_tokens if kind == "report" else self.max_new_tokens

    @property
    def named_paths(self) -> tuple[str, ...]:
        return tuple(spec.path for spec in self.open_judges if spec.path)

    @model_validator(mode="after")
    def _check_open_judges(self) -> EvaluateConfig:
        for spec in self.open_judges:
            if not spec.text_only:
                raise ValueError(
                    f"open_judges: {spec.name!r} compares an answer with the reference, which only the prompt of "
                    "text_only judges shows; set text_only: true"
                )
        return self


Floor = Annotated[float, Field(gt=0)] | None


class Floors(FrozenConfig):
    """Largest tolerated loss of each guarded metric against the champion; null: not guarded."""

    closed_accuracy: Floor = Field(default=0.05, description="Accuracy of closed questions.")
    open_f1: Floor = Field(default=0.05, description="Token-set F1 of open questions.")
    hit_rate: Floor = Field(default=0.1, description="Share of regions that hit the finding, where the key has boxes.")
    hallucination: Floor = Field(default=0.1, description="Share of absent findings called present.")
    abstention: Floor = Field(default=0.05, description="Share of answers that are empty, unreadable or say 'unknown'.")
    answer_length: Floor = Field(default=3.0, description="Mean length of answers, in words.")

    @property
    def enabled(self) -> dict[str, float]:
        return {name: floor for name, floor in self.model_dump().items() if floor is not None}


class DecideConfig(FrozenConfig):
    """When the challenger replaces the champion."""

    arm: str = Field(
        default="written",
        description="Kind of regions on which the decision rests: written, the policy's own, or served, the answers of "
        "the deployed server; evaluate.arms must contain it.",
    )
    lifetime_error: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="Probability of ever promoting wrongly, over all rounds (promotion/error_budget.py).",
    )
    protocol: Literal["strict", "llava-med", "parsed"] = Field(
        default="strict",
        description="How answers are graded, in the gain and all guards: strict, exact match; parsed, what an answer "
        "in sentences commits itself to, open ones by evaluate.open_judges; llava-med, substrings and recall.",
    )
    min_gain: float = Field(default=0.0, description="A promotion must show a gain in accuracy above this.")
    floors: Floors = Field(
        default=Floors(),
        description="Largest tolerated loss of each guarded metric against the champion; null: not guarded.",
    )
    max_off_format: Share = Field(
        default=0.02, description="Share of the challenger's answers that may be off format; more blocks the promotion."
    )
    max_unscored: Share = Field(
        default=0.05, description="Share of either side's answers, or of the judges' candidates, that may be unscored."
    )
    slices: PositiveInt = Field(
        default=1, description="Slices into which the benchmark's patients are split; decisions take turns on them."
    )
    max_uses: PositiveInt = Field(
        default=20, description="Decisions that a benchmark question may serve before it is overused."
    )
    max_near_duplicates: Share = Field(
        default=0.0,
        description="Share of benchmark images with a near-duplicate in training; more blocks, any duplicate warns.",
    )
    min_alpha: float = Field(
        default=0.1, le=1, description="Agreement of the judges (Krippendorff's α) below which the decision is blocked."
    )
    max_shift: float = Field(
        default=0.25, gt=0, description="Population stability index of the scores against the last round; more warns."
    )
    resamples: PositiveInt = Field(default=2000, description="Resamples of the intervals' cluster bootstrap.")
    seed: int = Field(default=0, description="Seed of the bootstrap.")


class PublishConfig(FrozenConfig):
    """How a checkpoint is stored in the model registry, under an address that is never used again."""

    store: OptionalText = Field(
        default="", description="Folder or s3://bucket/prefix; S3 is configured by AWS_… environment variables."
    )
    name: str = Field(
        default="clincot",
        pattern=_MODEL_NAME_PATTERN,
        description="Name of the model whose checkpoints succeed one another.",
    )
    adapter: Literal["merge", "keep"] = Field(
        default="merge", description="LoRA checkpoints: merge into the base's weights, or keep the adapter only."
    )
    round: int = Field(
        default=0, ge=0, description="Round of the checkpoint; 0: as recorded, or one after its parent's."
    )
    model_registry: OptionalText = Field(
        default="",
        description="Address of a Kubeflow Model Registry in which the checkpoint is registered too; empty: none.",
    )
    golden: int = Field(
        default=8, ge=0, description="Questions stored with their answers and regions, for smoke tests."
    )
    served: int = Field(
        default=32,
        ge=0,
        description="Benchmark questions stored with the answers of the arm served, which a rollout asks at its end.",
    )
    serve: ServeConfig = Field(
        default=ServeConfig(), description="How the checkpoint is to be served; the settings of `serve`."
    )
    licence: str = Field(
        default="Apache-2.0", min_length=1, description="SPDX name; a derived model carries the licence of its base."
    )


class DeployConfig(FrozenConfig):
    """How a published checkpoint is rolled out to an endpoint. Nothing here is secret."""

    steps: tuple[Annotated[int, Field(ge=1, le=100)], ...] = Field(
        default=(10, 50, 100), min_length=1, description="Shares of the traffic in percent, rising, the last one 100."
    )
    step_s: float = Field(default=60.0, ge=0, description="Seconds for which each share is watched.")
    ready_s: float = Field(
        default=1800.0,
        gt=0,
        description="Seconds until the new revision must be ready; large models take long to load.",
    )
    poll_s: float = Field(default=2.0, gt=0, description="Seconds between two reads of the cluster's state.")
    request_s: float = Field(default=60.0, gt=0, description="Deadline of one smoke request, in seconds.")
    max_error_rate: Share = Field(
        default=0.02, description="Share of users' requests to the new revision that may fail, of golden questions too."
    )
    smoke_iou: Share = Field(
        default=0.5, description="Smallest IoU at which an answer's region matches the golden one."
    )
    approval: bool = Field(default=False, description="Wait for `clincot approve` before the rollout starts.")
    approvers: tuple[str, ...] = Field(
        default=(),
        description="Who may approve: lines `NAME KEYTYPE KEY` with public SSH keys. With any, an approval needs a "
        "signature of one of them.",
        exclude_if=lambda lines: not lines,
    )
    model_registry: OptionalText = Field(
        default="",
        description="Address of a Kubeflow Model Registry whose property `champion` follows a rollout; empty: none.",
    )

    @model_validator(mode="after")
    def _check_traffic_steps(self) -> DeployConfig:
        if list(self.steps) != sorted(set(self.steps)) or self.steps[-1] != 100:
            raise ValueError(f"deploy.steps must rise and end at 100, got {self.steps}")
        return self

    @model_validator(mode="after")
    def _check_approvers(self) -> DeployConfig:
        if self.approvers and not self.approval:
            raise ValueError("deploy.approvers has an effect only with deploy.approval: true")
        return self


class PreflightConfig(FrozenConfig):
    """What is checked before a round requests a GPU.

    The round's own judges, store, data repository and benchmark are checked, and whether the starting policy can
    propose regions and be trained, and what the round costs is planned: Params.get_stage_config fills in these
    sections, so they cannot be set here. A pipeline fills in the addresses of its own data sets.
    """

    base: OptionalText = Field(
        default="",
        description="Starting policy, as round 0, of a model without a champion: a checkpoint's folder, shipped:NAME, "
        "or the beginning of a published checkpoint's digest.",
    )
    data: OptionalText = Field(default="", description="Address of the data set to check; empty: it is not checked.")
    benchmark: OptionalText = Field(
        default="", description="Address of the benchmark to check; empty: it is not checked."
    )
    calibration: OptionalText = Field(
        default="", description="Address of the judges' calibration data, for the leak check; empty: it is not checked."
    )
    cluster: Annotated[
        Literal["auto", "yes", "no"],
        BeforeValidator(_undo_yaml_boolean),
        Field(description="Check KServe and permissions: yes, no, or auto (in a pod or with KUBECONFIG set)."),
    ] = "auto"
    namespace: OptionalText = Field(
        default="", description="Namespace of the rollout; empty: the one in the service's settings."
    )
    free_gb: float = Field(
        default=5.0, ge=0, description="Free space needed in the work folder and in TMPDIR, in 10^9 bytes."
    )
    timeout_s: float = Field(
        default=60.0, gt=0, description="Deadline of each check in seconds; one that exceeds it fails."
    )
    verify_s: float = Field(
        default=900.0, gt=0, description="Deadline for reading and loading a checkpoint; 15 GB take minutes."
    )
    judge: JudgeConfig = JudgeConfig()
    publish: PublishConfig = PublishConfig()
    version: VersionConfig = VersionConfig()
    prepare: PrepareConfig = PrepareConfig()
    propose: ProposeConfig = ProposeConfig()
    answer: AnswerConfig = AnswerConfig()
    pair: PairConfig = PairConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    decide: DecideConfig = DecideConfig()


INHERITED_BY_PREFLIGHT = (
    "judge",
    "publish",
    "version",
    "prepare",
    "propose",
    "answer",
    "pair",
    "train",
    "evaluate",
    "decide",
)
SERVE_INHERITORS = ("evaluate", "publish")  # sections that take `serve` from the parameters of the round


class ModelsConfig(FrozenConfig):
    """How every stage loads models for inference: the policy, and judges that run in its process."""

    dtype: InferenceDtype = Field(
        default="auto",
        description="Number type; auto: bfloat16 on a GPU that computes in it, else float32. The environment variable "
        "CLINCOT_DTYPE overrides it, also that of a stage.",
    )
    engine: EngineName = Field(
        default="transformers",
        description="What runs the models of propose, answer, judge and evaluate: transformers in this process, vllm "
        "(a server that the stage starts and stops), or url (an endpoint that serves the policy).",
    )
    engines: dict[RolloutStage, EngineName] = Field(
        default={}, description="Engines of single stages that differ from `engine`, such as {judge: transformers}."
    )
    url: OptionalText = Field(
        default="", pattern=r"^(https?://\S+)?$", description="Base URL of the engine url, ending in /v1."
    )
    model: OptionalText = Field(
        default="",
        description="Name of the policy at that URL; empty: the first 12 digits of its digest, which tells rounds "
        "apart.",
    )
    api_key_env: OptionalText = Field(default="", description="Environment variable that holds the key of that URL.")
    vllm: VllmConfig = Field(default=VllmConfig(), description="Settings of the engine vllm.")

    def get_engine(self, stage: RolloutStage) -> EngineConfig:
        """The engine of a stage. Raises InvalidInput for the engine url without an address."""
        kind = self.engines.get(stage, self.engine)
        if kind == "transformers" or (stage == "judge" and kind == "url"):  # each judge has a url of its own
            return EngineConfig()
        if kind == "vllm":
            return EngineConfig(kind=kind, vllm=self.vllm)
        if not self.url:
            raise InvalidInput(f"the engine of {stage} is url, but models.url is empty; set it to the base URL (…/v1)")
        return EngineConfig(kind=kind, url=self.url, model=self.model, api_key_env=self.api_key_env, vllm=self.vllm)


class TrackingConfig(FrozenConfig):
    """Experiment trackers that get the metrics of every round; none by default.

    Their addresses and keys come from environment variables, such as MLFLOW_TRACKING_URI and WANDB_API_KEY. The section
    decides no result, so it enters no digest of the parameters.
    """

    to: tuple[Literal["mlflow", "tensorboard", "wandb"], ...] = Field(
        default=(), description="Trackers; their packages come with clincot[tracking]."
    )
    experiment: str = Field(
        default="clincot", min_length=1, description="Experiment of MLflow, or project of Weights & Biases."
    )
    folder: OptionalText = Field(
        default="", description="Folder of TensorBoard's files; empty: tracking/ in the run's folder."
    )
    required: bool = Field(default=False, description="Fail a round that cannot be logged; otherwise it is a warning.")


class RecipeReference(FrozenModel):
    """The recipe that parameters come from. Provenance only: it enters no digest."""

    name: str = Field(default="", description="Name of the recipe; empty: neutral defaults.")
    digest: str = Field(default="", description="Hash of the recipe's values.")
    changed: tuple[str, ...] = Field(default=(), description="Fields (section.field) that differ from the recipe.")


class Params(FrozenConfig):
    """All parameters of a round: what params.yaml holds."""

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
    serve: ServeConfig = ServeConfig()
    models: ModelsConfig = ModelsConfig()
    tracking: TrackingConfig = TrackingConfig()
    recipe: RecipeReference = RecipeReference()

    @model_validator(mode="after")
    def _check_preflight_inherits(self) -> Params:
        for name in INHERITED_BY_PREFLIGHT:
            if getattr(self.preflight, name) != getattr(PreflightConfig(), name):
                raise ValueError(f"preflight.{name} is the round's own; set {name} instead")
        return self

    @model_validator(mode="after")
    def _check_one_way_to_serve(self) -> Params:
        """A section that is given alone, as to a task of a pipeline, may hold its copy of `serve`."""
        for name in SERVE_INHERITORS:
            copy = getattr(self, name).serve
            if copy != ServeConfig() and self.serve not in (copy, ServeConfig()):
                raise ValueError(f"{name}.serve differs from serve; set serve alone, which holds for both")
        return self

    @model_validator(mode="after")
    def _check_independent_graders(self) -> Params:
        """Whoever made the pairs does not grade the policy trained on them, under whatever name or address."""
        panel = {spec.path or spec.model for spec in self.judge.judges}
        for spec in self.evaluate.open_judges:
            if (spec.path or spec.model) in panel and (spec.path or spec.model):
                raise ValueError(
                    f"evaluate.open_judges: {spec.path or spec.model} is also a judge of judge.judges; a policy is not "
                    "graded by the judges that made its preference pairs"
                )
        return self

    @property
    def digest(self) -> str:
        """Hash of all sections that decide results; the recipe's name and the trackers are not part of it."""
        return hash_json(self.model_dump(mode="json", exclude={"recipe", "tracking"}))

    def describe_recipe(self) -> dict[str, Any]:
        """Name and digest of the recipe, and the fields that differ from it, for the records of a run."""
        if self.recipe.name:
            return self.recipe.model_dump(mode="json")
        neutral = Params()
        return {"name": "neutral", "digest": neutral.digest, "changed": list(self.list_changes(neutral))}

    def list_changes(self, base: Params) -> tuple[str, ...]:
        """The fields (`section.field`) in which the parameters differ from others."""
        changed = []
        for section in SECTION_NAMES:
            before = getattr(base, section).model_dump(mode="json")
            for name, value in getattr(self, section).model_dump(mode="json").items():
                if before.get(name) != value:  # a default engine is not dumped
                    changed.append(f"{section}.{name}")
        return tuple(changed)

    def get_stage_config(self, stage: str) -> FrozenConfig:
        """Return the stage's section with what it takes from others.

        Preflight takes the judges, the store and the data repository to check; a stage that loads models takes
        `models.dtype`, unless it has a type of its own, and its engine; evaluate and publish take `serve`.
        """
        config: FrozenConfig = getattr(self, stage)
        if isinstance(config, PreflightConfig):
            return config.model_copy(update={name: self.get_stage_config(name) for name in INHERITED_BY_PREFLIGHT})
        if isinstance(config, EvaluateConfig | PublishConfig) and config.serve == ServeConfig():
            config = config.model_copy(update={"serve": self.serve})
        if getattr(config, "dtype", "") == "inherit":
            config = config.model_copy(update={"dtype": self.models.dtype})
        if stage in get_args(RolloutStage) and _is_default_engine(getattr(config, "engine", EngineConfig())):
            return config.model_copy(update={"engine": self.models.get_engine(stage)})  # type: ignore[arg-type]
        return config


SECTION_NAMES = tuple(name for name in Params.model_fields if name != "recipe")
