"""Whether a checkpoint can work as policy or as judge, from its files to two tokens that it really writes.

`clincot doctor` prints these checks, and preflight runs them on the checkpoints in local folders. A check that depends
on a failed one is not made. Nothing is downloaded and no code of a checkpoint is executed.
"""

from __future__ import annotations

import gc
import math
import os
import shlex
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

from clincot.config import ProposeConfig, TrainConfig
from clincot.errors import UserError
from clincot.geometry import box_from_xyxy
from clincot.jsonl import hash_files
from clincot.models.checked_encoder import (
    TEMPLATE_REMEDY,
    NoEndTokens,
    build_checked_encoder,
    refuse_template_errors,
)
from clincot.models.checkpoint import (
    ADAPTER_CONFIG,
    UnsupportedCheckpoint,
    check_no_adapter,
    check_weight_files,
    check_weight_headers,
    hash_checkpoint,
)
from clincot.models.encoding import ChatTemplateError, ConversationEncoder, read_picture
from clincot.models.inspection import TESTED_FAMILIES, read_end_ids, read_model_config, read_processor
from clincot.models.text_model import LanguageModelJudge, encode_text, read_text_config, read_text_tokenizer
from clincot.models.vlm import VisionLanguageModel
from clincot.models.weight_shapes import WEIGHTS_REMEDY, check_weight_shapes
from clincot.models.yes_no import find_yes_no_ids
from clincot.planning.gpu_memory import (
    GIB,
    SHARE_USED,
    MemoryEstimate,
    TrainingMethod,
    choose_method,
    count_pairs_in_pass,
    estimate_serving,
    estimate_training,
    format_count,
    format_gib,
)
from clincot.planning.model_sizes import ModelSize, measure_model
from clincot.preflight.preflight_report import PreflightCheck, fail_check, pass_check, skip_check
from clincot.prompts import (
    ChainStep,
    Conversation,
    PromptFormat,
    chain_prompt,
    collect_views,
    judge_prompt,
    load_prompt_format,
    text_judge_prompt,
)
from clincot.records import Study
from clincot.text import format_count as format_text_count
from clincot.training.resolved_settings import LARGE_MODEL_LORA_R

_FILM_SIDE, _SMALL_SIDE = 1024, 32  # pixels of the picture that tokens are counted on, and of the one that is shown
_QUESTION = "Is there a nodule in the left lung?"
_BOX = box_from_xyxy((0.1, 0.1, 0.6, 0.6))
_SERVED_TOGETHER = 16  # conversations in one batch, for the memory of serving
_ANSWER_TOKENS = 160  # the longest report by default
_READS_YES_NO = {"windows", "relevance"}  # grounders that read P(yes) of the policy
MAX_PREFLIGHT_BYTES = 4.0 * GIB  # preflight may run in a small pod: larger weights are not loaded there
_TURN = threading.Lock()
_WEIGHTS_PROBE = "names and shapes in the safetensors headers, against the model of config.json"
_NOT_FINITE = "log-probabilities of the next token that are no finite numbers: the weights are damaged"
_TEXT_PROMPT = text_judge_prompt(question=_QUESTION, answer="yes", box=_BOX)
_TRANSFORMERS_BUG = "report it with the checkpoint's name, and use a tested family meanwhile: " + TESTED_FAMILIES


@dataclass(frozen=True)
class DoctorOptions:
    """What a checkpoint is examined for."""

    role: Literal["policy", "judge", "text-judge"] = "policy"  # text-judge: a language model without image input
    thinking: bool = True  # text-judge: False asks the chat template for no thinking block
    train: TrainConfig | None = None  # None: memory for training is not estimated
    propose: ProposeConfig = field(default_factory=ProposeConfig)
    gpu_gib: float | None = None  # memory of the GPU; None: estimates are shown and compared with nothing
    generate: bool = True
    max_generate_bytes: float | None = None  # largest weights with which tokens are generated; None: what memory allows


@dataclass
class _Checkup:
    """What is known of a checkpoint so far."""

    path: Path
    options: DoctorOptions
    config: Any = None
    processor: Any = None
    tokenizer: Any = None  # of a text-judge
    encoder: ConversationEncoder | None = None
    end_error: NoEndTokens | None = None  # with it, `encoder` ends turns with any token
    views: PromptFormat = field(default_factory=PromptFormat)
    tokens: int = 0  # of a conversation with a film and its crop
    size: ModelSize | None = None
    text_weights: int = 0  # numbers in the weights of a text-judge

    @property
    def known_size(self) -> ModelSize:
        assert self.size is not None
        return self.size

    @property
    def known_encoder(self) -> ConversationEncoder:
        assert self.encoder is not None
        return self.encoder


Step = Callable[[_Checkup], PreflightCheck]


def examine_checkpoint(path: Path, options: DoctorOptions) -> Iterator[PreflightCheck]:
    """All checks of a checkpoint folder, in the order of the table. What a checkpoint contains raises nothing."""
    checkup = _Checkup(path, options)
    files = _run_step("files", f"{path}: config.json and safetensors, all of them", _check_files, checkup)
    yield files
    if not (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file():
        return
    yield from _examine_loading(checkup, whole=files.state == "pass")


def examine_in_preflight(name: str, path: Path, options: DoctorOptions) -> Iterator[PreflightCheck]:
    """The checks after `files`, which preflight has made already, each called "name: check".

    Preflight's probes run in threads at once. Here they take turns: one model is in memory at a time.
    """
    options = replace(options, max_generate_bytes=MAX_PREFLIGHT_BYTES)
    with _TURN:
        for check in _examine_loading(_Checkup(path, options), whole=True):
            yield check.model_copy(update={"name": f"{name}: {check.name}"})


def _examine_loading(checkup: _Checkup, *, whole: bool) -> Iterator[PreflightCheck]:
    """From the config class to generated tokens. whole: the files are complete, so the weights may be loaded."""
    if checkup.options.role == "text-judge":
        yield from _examine_text_judge(checkup, whole=whole)
        return
    config = _run_step("config class", "config.json names a model of transformers", _check_config, checkup)
    yield config
    if config.state == "fail":
        return
    readable = True
    for name, probe, step in (
        ("processor", "the processor is complete and reports its image tokens", _check_processor),
        ("chat template", "two pictures, a region and a question as one conversation", _check_template),
        ("tokens", "ids as processor.apply_chat_template(tokenize=True) makes them", _check_tokens),
    ):
        check = _run_step(name, probe, step, checkup)
        yield check
        if check.state == "fail":
            readable = False
            break
    if readable:
        for name, probe, step in (
            ("image tokens", f"a film of {_FILM_SIDE} x {_FILM_SIDE} pixels and its crop", _check_image_tokens),
            ("yes and no", "single tokens from which P(yes) is read", _check_yes_no),
            ("end tokens", "tokens that end the model's turn", _check_end_tokens),
            ("region form", "how the checkpoint writes a region", _check_region_form),
            ("vocabulary", "every token of the tokenizer has an embedding", _check_vocabulary),
        ):
            check = _run_step(name, probe, step, checkup)
            yield check
            readable = readable and check.state != "fail"
    yield _run_step("memory: serving", "weights, keys and values, activations", _check_serving_memory, checkup)
    if checkup.options.train is not None and checkup.options.role == "policy":
        probe = "weights, gradients, Adam, activations of one step of the recipe"
        yield _run_step("memory: training", probe, _check_training_memory, checkup)
    if whole:
        weights = _run_step("weights", _WEIGHTS_PROBE, _check_weights, checkup)
        yield weights
        if readable and weights.state != "fail":
            probe = f"two tokens about a picture of {_SMALL_SIDE} x {_SMALL_SIDE} pixels"
            yield _run_step("generation", probe, _check_generation, checkup)


def _examine_text_judge(checkup: _Checkup, *, whole: bool) -> Iterator[PreflightCheck]:
    """The checks of a judge that reads text only, from the config class to P(yes). A failed one is the last."""
    steps: list[tuple[str, str, Step]] = [
        ("config class", "config.json names a causal language model of transformers", _check_text_config),
        ("tokenizer", "the question to the judge becomes tokens", _check_text_tokenizer),
        ("yes and no", "single tokens from which P(yes) is read", _check_text_yes_no),
        ("vocabulary", "every token of the tokenizer has an embedding", _check_vocabulary),
    ]
    if whole:
        steps += [
            ("weights", _WEIGHTS_PROBE, _check_weights),
            ("generation", "P(yes) of an answer", _check_text_judgement),
        ]
    for name, probe, step in steps:
        check = _run_step(name, probe, step, checkup)
        yield check
        if check.state == "fail":
            return


def _run_step(name: str, probe: str, step: Step, checkup: _Checkup) -> PreflightCheck:
    """One check. Any exception is a failed one: transformers meets files here that it was not made for."""
    try:
        check = step(checkup)
    except UnsupportedCheckpoint as error:
        return fail_check(name, probe, error.problem, error.remedy or "use a complete, published checkpoint")
    except (UserError, OSError) as error:
        return fail_check(name, probe, str(error), "correct the file that the result names")
    except Exception as error:
        return fail_check(name, probe, f"{type(error).__name__}: {error}", _TRANSFORMERS_BUG)
    return check.model_copy(update={"name": name, "probe": probe})


def _passed(result: str) -> PreflightCheck:
    return pass_check("-", "-", result)


def _failed(result: str, remedy: str) -> PreflightCheck:
    return fail_check("-", "-", result, remedy)


# --- files, config, processor


def _check_files(checkup: _Checkup) -> PreflightCheck:
    path = checkup.path
    if not path.is_dir():
        return _failed(
            f"{path} is not a folder on this machine",
            f"download it, for instance with `hf download {shlex.quote(str(path))} --local-dir DIR`, and name DIR",
        )
    check_no_adapter(path)
    if not (path / "config.json").is_file():
        return _failed(f"{path} has no config.json", "copy config.json from the published checkpoint")
    check_weight_files(path)
    digest = hash_checkpoint(path)
    check_weight_headers(path)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return _passed(f"{size / 1e9:.3g} GB of safetensors, digest {digest[:12]}")


def _check_config(checkup: _Checkup) -> PreflightCheck:
    checkup.config = read_model_config(str(checkup.path))
    checkup.views = load_prompt_format(checkup.path)
    checkup.size = measure_model(checkup.config)
    kind = f"{type(checkup.config).__name__} (model_type {checkup.config.model_type!r})"
    return _passed(f"{kind}, {format_count(checkup.size.total)} parameters")


def _check_processor(checkup: _Checkup) -> PreflightCheck:
    processor = read_processor(str(checkup.path), checkup.config.model_type)
    checkup.processor = processor
    names = (type(part).__name__ for part in (processor, processor.image_processor, processor.tokenizer))
    return _passed(", ".join(names))


def _check_template(checkup: _Checkup) -> PreflightCheck:
    """The template shows every picture, keeps earlier turns, and shows the model's own turns as they were written."""
    path, processor = checkup.path, checkup.processor
    end_ids = read_end_ids(str(path), checkup.config)
    try:
        encoder = build_checked_encoder(path, processor, end_ids=end_ids)
    except NoEndTokens as error:  # the check of end tokens raises it
        checkup.end_error = error
        with refuse_template_errors(path):
            encoder = ConversationEncoder(processor, end_ids=[0])
    with tempfile.TemporaryDirectory() as folder, refuse_template_errors(path):
        conversation = _build_conversation(Path(folder), checkup.views, _SMALL_SIDE)
        encoded = encoder.encode(conversation, reply=True)
        if checkup.options.role == "policy":
            _check_own_turns(encoder, _build_trained_conversation(Path(folder), encoder, checkup.views))
    if not all(encoded.picture_tokens):
        raise UnsupportedCheckpoint(f"{path}: a picture becomes no image token", TEMPLATE_REMEDY)
    checkup.encoder = encoder
    if processor.chat_template is None:
        return _passed("none: pictures, then the text in lines, as this family's processor lays it out")
    return _passed(f"{len(processor.chat_template)} characters, {encoder.placeholder!r} for each picture")


def _build_trained_conversation(folder: Path, encoder: ConversationEncoder, views: PromptFormat) -> Conversation:
    """A question, a region that the policy wrote, its crop and an answer; both are trained.

    A family without a chat template is trained on answers only.
    """
    step = ChainStep(_QUESTION, _BOX, written=encoder.processor.chat_template is not None, answer="Yes")
    return chain_prompt(_write_study(folder, _SMALL_SIDE), folder, views, [step])


def _check_own_turns(encoder: ConversationEncoder, conversation: Conversation) -> None:
    """Raise ChatTemplateError unless the tokens to train on are the policy's turns, each with its end token."""
    encoded = encoder.encode(conversation, reply=False)
    runs = []
    for is_action, pairs in groupby(zip(encoded.ids, encoded.actions, strict=True), key=lambda pair: pair[1]):
        if is_action:
            runs.append([token for token, _ in pairs])
    turns = [turn.text for turn in conversation if turn.action]
    written = [encoder.tokenizer.decode(run[:-1]) for run in runs]
    # white space between a template's parts and the tokens of a text is the tokenizer's
    if ["".join(text.split()) for text in written] != ["".join(text.split()) for text in turns]:
        raise ChatTemplateError(f"the chat template shows the model's turns {turns!r} as {written!r}")
    if not all(run[-1] in encoder.end_ids for run in runs):
        raise ChatTemplateError("a turn of the model is not followed by its end token")


def _check_tokens(checkup: _Checkup) -> PreflightCheck:
    """The ids that this program feeds are the processor's own, so the model sees what it was trained on."""
    encoder = checkup.known_encoder
    with tempfile.TemporaryDirectory() as folder:
        conversation = _build_conversation(Path(folder), checkup.views, _SMALL_SIDE)
        ours, theirs = encoder.encode(conversation, reply=True).ids, _encode_by_processor(encoder, conversation)
    if list(ours) == theirs:
        return _passed(f"{len(theirs)} ids, all equal")
    common = min(len(ours), len(theirs))
    position = next((n for n in range(common) if ours[n] != theirs[n]), common)
    return _failed(
        f"{len(ours)} ids where the processor makes {len(theirs)}; the first difference is at {position}",
        _TRANSFORMERS_BUG,
    )


def _encode_by_processor(encoder: ConversationEncoder, conversation: Conversation) -> list[int]:
    """Ids of a conversation as a user of transformers gets them."""
    processor = encoder.processor
    if processor.chat_template is None:
        images = [read_picture(picture) for picture in collect_views(conversation)]
        lines = "\n".join(turn.text for turn in conversation)
        text = processor.image_token * len(images) + lines
        out = processor(text=[text], images=[images], return_tensors="pt")
    else:
        messages = []
        for turn in conversation:
            content: list[dict[str, Any]] = [{"type": "image", "image": read_picture(one)} for one in turn.pictures]
            messages.append({"role": turn.role, "content": [*content, {"type": "text", "text": turn.text}]})
        out = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    ids: list[int] = out["input_ids"][0].tolist()
    return ids


def _build_conversation(folder: Path, views: PromptFormat, side: int) -> Conversation:
    """A question about a grey picture, a region, and its crop, ready for the answer."""
    step = ChainStep(_QUESTION, _BOX, written=False)
    return chain_prompt(_write_study(folder, side), folder, views, [step])


def _write_study(folder: Path, side: int) -> Study:
    path = folder / "grey.png"
    Image.new("RGB", (side, side), (96, 96, 96)).save(path)
    return Study(image=path.name, sha256=hash_files(path), width=side, height=side)


# --- tokens


def _check_image_tokens(checkup: _Checkup) -> PreflightCheck:
    with tempfile.TemporaryDirectory() as folder:
        conversation = _build_conversation(Path(folder), checkup.views, _FILM_SIDE)
        encoded = checkup.known_encoder.encode(conversation, reply=True)
    checkup.tokens = len(encoded.ids)
    *whole, crop = encoded.picture_tokens
    return _passed(f"{sum(whole)} for the film, {crop} for the crop, {len(encoded.ids)} tokens with the question")


def _check_yes_no(checkup: _Checkup) -> PreflightCheck:
    grounders = checkup.options.propose.grounders
    readers = " and ".join(sorted(_READS_YES_NO & {*grounders}))
    tokenizer = checkup.known_encoder.tokenizer
    try:
        yes, no = find_yes_no_ids(tokenizer, checkup.path)
    except UnsupportedCheckpoint as error:
        if checkup.options.role == "judge":
            raise
        if readers:
            raise UnsupportedCheckpoint(
                f"{error.problem}, as the {readers} grounder does",
                f"propose regions with other grounders (propose.grounders: {{written: 4}}), or {error.remedy}",
            ) from error
        return _passed(f"none, and none is needed: regions come from {', '.join(grounders)}")
    return _passed(f"yes: {_show_tokens(tokenizer, yes)}; no: {_show_tokens(tokenizer, no)}")


def _check_end_tokens(checkup: _Checkup) -> PreflightCheck:
    encoder = checkup.known_encoder
    if checkup.end_error is not None:
        raise checkup.end_error
    return _passed(_show_tokens(encoder.tokenizer, sorted(encoder.end_ids)))


def _show_tokens(tokenizer: Any, ids: list[int]) -> str:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return ", ".join(f"{token} ({number})" for token, number in zip(tokens, ids, strict=True))


def _check_region_form(checkup: _Checkup) -> PreflightCheck:
    return _passed(f"{checkup.views.region_form}, wording {checkup.views.wording!r}")


# --- vocabulary, weights


def _check_vocabulary(checkup: _Checkup) -> PreflightCheck:
    """No token lies outside of the embedding, and config and processor agree on the image token."""
    rows = checkup.config.get_text_config().vocab_size
    tokenizer = checkup.tokenizer or checkup.known_encoder.tokenizer
    vocabulary = tokenizer.get_vocab()
    if checkup.options.role == "text-judge":  # rows of a batch are padded with the first token
        vocabulary.pop(tokenizer.pad_token, None)
    word, highest = max(vocabulary.items(), key=lambda entry: entry[1])
    if highest >= rows:
        return _failed(
            f"the tokenizer's {word!r} is token {highest}, and the embedding has {rows} rows (vocab_size)",
            "copy config.json, the tokenizer's files and all *.safetensors from the same published checkpoint",
        )
    image_id = getattr(checkup.config, "image_token_id", None)
    if checkup.encoder is not None and image_id is not None and image_id not in checkup.encoder.image_ids:
        return _failed(
            f"config.json has image_token_id {image_id}, and the processor writes {sorted(checkup.encoder.image_ids)}",
            "copy config.json and the processor's files from the same published checkpoint",
        )
    return _passed(f"{len(vocabulary)} tokens, {rows} rows")


def _check_weights(checkup: _Checkup) -> PreflightCheck:
    if getattr(checkup.config, "quantization_config", None):
        return skip_check("-", "-", "quantised: the stored tensors have other names and shapes than the model's")
    auto_class = AutoModelForCausalLM if checkup.options.role == "text-judge" else AutoModelForImageTextToText
    with _hidden_progress():
        count = check_weight_shapes(checkup.path, checkup.config, auto_class)
    return _passed(f"{count} tensors, none missing")


# --- a judge that reads text only


def _check_text_config(checkup: _Checkup) -> PreflightCheck:
    checkup.config = read_text_config(str(checkup.path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkup.config)
    checkup.text_weights = sum(weight.numel() for weight in model.parameters())
    kind = f"{type(checkup.config).__name__} (model_type {checkup.config.model_type!r})"
    return _passed(f"{kind}, {format_count(checkup.text_weights)} parameters")


def _check_text_tokenizer(checkup: _Checkup) -> PreflightCheck:
    checkup.tokenizer = read_text_tokenizer(str(checkup.path))
    options = {} if checkup.options.thinking else {"enable_thinking": False}
    ids = encode_text(checkup.path, checkup.tokenizer, _TEXT_PROMPT, options)
    template = "no chat template" if checkup.tokenizer.chat_template is None else "its chat template"
    return _passed(f"{type(checkup.tokenizer).__name__}, {template}, {len(ids)} tokens for a question")


def _check_text_yes_no(checkup: _Checkup) -> PreflightCheck:
    yes, no = find_yes_no_ids(checkup.tokenizer, checkup.path)
    return _passed(f"yes: {_show_tokens(checkup.tokenizer, yes)}; no: {_show_tokens(checkup.tokenizer, no)}")


def _check_text_judgement(checkup: _Checkup) -> PreflightCheck:
    reason = _find_obstacle(checkup.options, checkup.text_weights)
    if reason:
        return skip_check("-", "-", reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    with _hidden_progress(), _freed_memory(device):
        judge = LanguageModelJudge(checkup.path, device=device, dtype=dtype, thinking=checkup.options.thinking)
        if not judge.compute_next_token_logprobs([_TEXT_PROMPT]).isfinite().all():
            return _failed(_NOT_FINITE, WEIGHTS_REMEDY)
        (p_yes,) = judge.p_yes([_TEXT_PROMPT])
    return _passed(f"P(yes) {'unreadable' if p_yes is None else f'{p_yes:.3f}'} on {device}")


# --- memory


def _check_serving_memory(checkup: _Checkup) -> PreflightCheck:
    size = checkup.known_size
    estimate = estimate_serving(size, tokens=_count_tokens(checkup), batch=_SERVED_TOGETHER)
    about = f"bfloat16, {_SERVED_TOGETHER} conversations at once"
    remedy = "use a GPU with more memory, or serve it with vLLM on several GPUs (tensor parallelism)"
    return _compare_memory(checkup, f"{estimate}: {about}", estimate, remedy)


def _check_training_memory(checkup: _Checkup) -> PreflightCheck:
    size, train = checkup.known_size, checkup.options.train
    assert train is not None
    tokens, method = _count_tokens(checkup), choose_method(size, train)
    estimate = estimate_training(size, train, tokens=tokens, method=method)
    pairs = format_text_count(count_pairs_in_pass(train), "pair")
    about = f"{method}, {pairs} in a pass of {tokens} tokens each"
    return _compare_memory(checkup, f"{estimate}: {about}", estimate, _suggest_training(checkup, size, train, tokens))


def _count_tokens(checkup: _Checkup) -> int:
    """Tokens of a conversation with its answer; without a working processor a guess for two tiles of pictures."""
    return (checkup.tokens or 2048) + _ANSWER_TOKENS


def _suggest_training(checkup: _Checkup, size: ModelSize, train: TrainConfig, tokens: int) -> str:
    """What would fit: fewer pairs in a pass, or a LoRA in bfloat16 on top of that; or several GPUs."""
    limit = (checkup.options.gpu_gib or 0) * SHARE_USED
    lora = TrainingMethod(train.lora_r or LARGE_MODEL_LORA_R, bfloat16=True, four_bit=False)
    everything = "train.full_finetuning=false " if train.full_finetuning else ""
    for method, setting in ((None, ""), (lora, f"{everything}train.lora_r={lora.rank} train.dtype=bfloat16 ")):
        for halvings in range(train.batch_size.bit_length()):
            smaller = train.model_copy(update={"batch_size": train.batch_size >> halvings})
            estimate = estimate_training(size, smaller, tokens=tokens, method=method)
            if estimate.gib <= limit:
                return f"--set {setting}train.batch_size={smaller.batch_size}: {format_gib(estimate.gib)} GiB"
    return "use a GPU with more memory, or shard the model over several (launch.yaml: sharding: full)"


def _compare_memory(checkup: _Checkup, result: str, estimate: MemoryEstimate, remedy: str) -> PreflightCheck:
    limit = checkup.options.gpu_gib
    if limit is None:
        return _passed(f"about {result}")
    usable = limit * SHARE_USED
    if estimate.gib > usable:
        return _failed(f"about {result}; {format_gib(usable)} of the GPU's {limit:g} GiB can be used", remedy)
    return _passed(f"about {result}; fits into {limit:g} GiB")


# --- generation


def _check_generation(checkup: _Checkup) -> PreflightCheck:
    reason = _find_obstacle(checkup.options, checkup.known_size.total)
    if reason:
        return skip_check("-", "-", reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    with _freed_memory(device):
        with _hidden_progress():
            model = VisionLanguageModel(checkup.path, device=device, dtype=dtype)
        with tempfile.TemporaryDirectory() as name:
            check = _generate_tokens(model, Path(name), checkup.options.role)
        del model
    return check


@contextmanager
def _freed_memory(device: str) -> Iterator[None]:
    """Free the memory of a model afterwards, which the next check may need."""
    try:
        yield
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _hidden_progress() -> Iterator[None]:
    """Without transformers' progress bars, which would stand among preflight's messages."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _generate_tokens(model: VisionLanguageModel, folder: Path, role: str) -> PreflightCheck:
    study = _write_study(folder, _SMALL_SIDE)
    step = ChainStep(_QUESTION, _BOX, written=False)
    conversation = chain_prompt(study, folder, model.views, [step])
    (generation,) = model.generate([conversation], max_new_tokens=2, temperature=0.0, seeds=[0])
    if not all(map(math.isfinite, generation.token_logprobs)):
        return _failed(_NOT_FINITE, WEIGHTS_REMEDY)
    result = f"{generation.text!r} on {model.model.device.type}"
    if role == "judge":
        prompt = judge_prompt(study, folder, model.views, question=_QUESTION, answer="yes", box=_BOX)
        (p_yes,) = model.p_yes([prompt])
        result += ", P(yes) " + ("unreadable for a grey picture" if p_yes is None else f"{p_yes:.3f}")
    return _passed(result)


def _find_obstacle(options: DoctorOptions, weights: int) -> str:
    """Why no token is generated, or "". weights: how many numbers they are."""
    if not options.generate:
        return "not asked for (--no-generate)"
    on_gpu = torch.cuda.is_available()
    needed = weights * (2 if on_gpu else 4)
    limit = options.max_generate_bytes
    if limit is not None and needed > limit:
        return f"the weights take {needed / GIB:.3g} GiB, above the limit of {limit / GIB:.3g} GiB for this check"
    free = torch.cuda.mem_get_info()[0] if on_gpu else find_free_memory()
    if needed > free * SHARE_USED:
        where = "GPU" if on_gpu else "machine"
        return f"the weights take {needed / GIB:.3g} GiB, and this {where} has {free / GIB:.3g} GiB free"
    return ""


def find_gpu_memory() -> float | None:
    """GiB of the first GPU of this machine; None without one."""
    return torch.cuda.mem_get_info()[1] / GIB if torch.cuda.is_available() else None


def find_free_memory() -> float:
    """Bytes of main memory that can be used: the machine's, within the limit of this container (cgroup v2)."""
    free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for line in _read_lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = float(line.split()[1]) * 1024
    limit, used = (_read_lines(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():
        free = min(free, float(limit[0]) - float(used[0]))
    return free


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
