"""Supervised fine-tuning on conversations: for the tiny models, and on chosen sides as a baseline for DPO.

A plain training loop in one process. The vision tower is frozen by default and encodes each picture once. Batches hold
conversations of similar length, and conversations about one image are packed into one sequence.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from clincot.clients.trackers import TrackedRun, Tracker, flatten_params, open_tracker
from clincot.config import TrainConfig
from clincot.errors import InvalidInput
from clincot.models.encoding import EncodedConversation
from clincot.models.vlm import VisionLanguageModel
from clincot.records import hash_json
from clincot.training.checkpoint_writer import (
    NonFiniteError,
    average_last_steps,
    build_cosine_schedule,
    get_events_folder,
    name_training_run,
    open_partial_folder,
    save_checkpoint,
)
from clincot.training.collate import (
    Batch,
    ConversationCollator,
    compute_action_logprobs,
    make_feature_source,
    make_pixel_source,
    make_tower_source,
    supports_packing,
)
from clincot.training.resolved_settings import (
    Device,
    ResolvedSettings,
    count_checkpoint_parameters,
    count_step_parts,
    describe_settings,
    log_settings,
    resolve_settings,
)
from clincot.training.rows import SFTRow
from clincot.training.trained_parts import (
    build_lora_config,
    find_projectors,
    freeze_modules,
    keep_trained_weights_in_float32,
    set_projector_rate,
)

# Shape suffixes: N conversations of a micro-batch.

LOG_EVERY = 10  # steps between two updates of the progress bar's loss
BUCKET_SIZE = 50  # number of batches whose rows are sorted by length together
PACK_SIZE = 8  # most conversations packed into one sequence
RESUME_FILE = "resume.pt"

MicroBatch = list[list[int]]  # packs of row indices


def train_on_rows(
    rows: Sequence[SFTRow],
    policy_dir: Path,
    out_dir: Path,
    config: TrainConfig,
    *,
    held_out: Sequence[SFTRow] = (),
    progress: bool = True,
) -> dict[str, float]:
    """Train the policy of `policy_dir` on conversations; the finished checkpoint appears at `out_dir`.

    The loss is the negative log-probability (nats) of the action tokens, averaged over the action tokens of a batch.
    Fields of `config` that are used: lr, epochs, batch_size (conversations), grad_accumulation, warmup_ratio,
    max_grad_norm, freeze_vision, train_projector, projector_lr, full_finetuning, lora_*, dtype,
    save_steps, report_to, seed. An interrupted call resumes at the last multiple of save_steps.

    Returns the mean loss of the last tenth of the steps, the numbers of rows and steps and, with `held_out`, its loss.
    Raises InvalidInput without rows, NonFiniteError for a loss or gradient that is NaN or infinite.
    """
    if not rows:
        raise InvalidInput("no rows to train on")
    settings = resolve_settings(config, count_checkpoint_parameters(policy_dir), Device.detect())
    log_settings(settings)
    gpu = torch.cuda.is_available()
    policy = VisionLanguageModel(policy_dir, device="cuda" if gpu else "cpu", dtype=settings.weights_dtype)
    run = hash_json(
        [
            policy.digest,
            config.digest,
            describe_settings(settings),
            [[row.name, repr(row.conversation)] for row in rows],
        ]
    )
    partial = open_partial_folder(out_dir, run)
    loop = _SftLoop(policy, config, settings)
    tracked = TrackedRun(
        os.environ.get("MLFLOW_EXPERIMENT_NAME") or "clincot",
        name_training_run(out_dir),
        Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or get_events_folder(out_dir)),
        flatten_params(config.model_dump(mode="json")),
    )
    loop.trackers = [open_tracker(name, tracked) for name in config.report_to]
    loop.train_epochs(rows, partial / RESUME_FILE, progress=progress)
    for tracker in loop.trackers:
        tracker.close()
    metrics = {**average_last_steps(loop.log), "rows": float(len(rows)), "steps": float(loop.step)}
    if held_out:
        metrics["held_out_loss"] = loop.measure_loss(held_out)
    save_checkpoint(loop.model, policy.encoder.processor, policy.views, out_dir, settings=settings, log=loop.log)
    return metrics


class _SftLoop:
    """The model, optimiser and log of one training run."""

    def __init__(self, policy: VisionLanguageModel, config: TrainConfig, settings: ResolvedSettings) -> None:
        torch.manual_seed(config.seed)
        self.config, self.settings = config, settings
        model: Any = policy.model
        freeze_modules(model, vision=config.freeze_vision, projector=not config.train_projector)
        shared = config.freeze_vision and policy.has_frames
        source = make_pixel_source(policy.encoder)
        if shared and config.train_projector:
            source = make_tower_source(policy, settings.weights_dtype)
        elif shared:
            source = make_feature_source(policy.encode_pictures)
        self.collator = ConversationCollator(policy.encoder, source, packed=shared and supports_packing(model))
        self.model: Any = model
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if settings.lora_r:
            from peft import get_peft_model

            self.model = get_peft_model(model, build_lora_config(model, settings))
            keep_trained_weights_in_float32(self.model)
        self.projector: Any = None  # applied to the states of the tower, if it is trained and the tower is fixed
        if shared and config.train_projector:
            (self.projector,) = find_projectors(model).values()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=config.lr, weight_decay=0.0)
        if config.train_projector and settings.projector_lr != config.lr:
            set_projector_rate(self.optimiser, self.model, settings.projector_lr)
        self.log: list[dict[str, float]] = []
        self.step = 0
        self.trackers: list[Tracker] = []

    def train_epochs(self, rows: Sequence[SFTRow], resume: Path, *, progress: bool) -> None:
        config = self.config
        encoded = [
            self.collator.encode_conversation(row.conversation, row.name)
            for row in tqdm(rows, desc="encoding", unit="row", disable=None if progress else True)
        ]
        steps = max(1, round(config.epochs * len(plan_epoch_steps(encoded, config, 0))))
        schedule = build_cosine_schedule(self.optimiser, config.warmup_ratio, steps)
        if resume.is_file():
            self._load_state(resume, schedule)
        self.model.train()
        bar = tqdm(
            total=steps, initial=self.step, desc="SFT", unit="step", mininterval=1, disable=None if progress else True
        )
        for micro_batches in iter_steps(encoded, config, start=self.step, stop=steps):
            rate = schedule.get_last_lr()[0]
            loss = self._train_step(micro_batches, encoded, rows)
            schedule.step()
            self.step += 1
            self.log.append({"step": self.step, "loss": loss, "learning_rate": rate})
            for tracker in self.trackers:
                tracker.log({"train/loss": loss, "train/learning_rate": rate}, self.step)
            bar.update()
            if self.step % LOG_EVERY == 0:
                mean_loss = sum(entry["loss"] for entry in self.log[-LOG_EVERY:]) / LOG_EVERY
                bar.set_postfix(loss=f"{mean_loss:.4f}")
            if config.save_steps and self.step % config.save_steps == 0 and self.step < steps:
                self._save_state(resume, schedule)
        bar.close()

    def measure_loss(self, rows: Sequence[SFTRow]) -> float:
        """Mean negative log-probability (nats) of the rows' action tokens, without training."""
        self.model.eval()
        total, count = 0.0, 0
        size = self.config.batch_size // count_step_parts(self.config)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            names = [row.name for row in batch]
            with torch.no_grad():
                encoded = [self.collator.encode_conversation(row.conversation, row.name) for row in batch]
                logps_N, tokens_N = self._forward_batch(encoded, names, [[i] for i in range(len(batch))])
            total -= float(logps_N.sum())
            count += int(tokens_N.sum())
        return total / count

    def _train_step(
        self, micro_batches: Sequence[MicroBatch], encoded: Sequence[EncodedConversation], rows: Sequence[SFTRow]
    ) -> float:
        """Take one optimiser step; the loss is the mean over the action tokens of all its micro-batches."""
        batches = [list(chain.from_iterable(micro_batch)) for micro_batch in micro_batches]
        step_rows = list(chain.from_iterable(batches))
        tokens = sum(sum(encoded[i].actions) for i in step_rows)
        total = 0.0
        self.optimiser.zero_grad(set_to_none=True)
        for micro_batch, batch in zip(micro_batches, batches, strict=True):
            names = [rows[i].name for i in batch]
            logps_N, _ = self._forward_batch([encoded[i] for i in batch], names, _number_members(micro_batch))
            bad = [name for name, logp in zip(names, logps_N.tolist(), strict=True) if not math.isfinite(logp)]
            if bad:
                raise NonFiniteError(
                    f"step {self.step + 1}: the loss is not finite for {', '.join(bad)}; no checkpoint was written"
                )
            loss = -logps_N.sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        if not torch.isfinite(norm):
            names = [rows[i].name for i in step_rows]
            raise NonFiniteError(f"step {self.step + 1}: the gradient is not finite, with {', '.join(names)}")
        self.optimiser.step()
        return total

    def _forward_batch(
        self, encoded: Sequence[EncodedConversation], names: Sequence[str], groups: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probability, number) of the action tokens of each conversation, both (N,)."""
        device = self.trained[0].device
        batch: Batch = {k: v.to(device) for k, v in self.collator(encoded, names, groups).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            if self.projector is not None and "features" in batch:
                batch["features"] = self.projector(batch["features"])
            logprobs = compute_action_logprobs(self.model, batch, len(encoded))
            return logprobs.sum_N, logprobs.tokens_N

    def _save_state(self, path: Path, schedule: Any) -> None:
        """Write everything that resuming needs; the file is replaced only when the new one is complete."""
        partial = path.with_suffix(".writing")
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        state = {"trained": trained, "optimiser": self.optimiser.state_dict(), "schedule": schedule.state_dict()}
        torch.save({**state, "step": self.step, "log": self.log, "random": torch.get_rng_state()}, partial)
        partial.replace(path)

    def _load_state(self, path: Path, schedule: Any) -> None:
        state = torch.load(path, weights_only=True, map_location=self.trained[0].device)
        self.model.load_state_dict(state["trained"], strict=False)
        self.optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        self.step, self.log = state["step"], state["log"]
        torch.set_rng_state(state["random"].cpu())


def iter_steps(
    encoded: Sequence[EncodedConversation], config: TrainConfig, *, start: int, stop: int
) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of each step from `start` to `stop`; they depend only on the seed and the step."""
    step, epoch = 0, 0
    while step < stop:
        for micro_batches in plan_epoch_steps(encoded, config, epoch)[: stop - step]:
            if step >= start:
                yield micro_batches
            step += 1
        epoch += 1


def plan_epoch_steps(encoded: Sequence[EncodedConversation], config: TrainConfig, epoch: int) -> list[list[MicroBatch]]:
    """The micro-batches of an epoch's steps, each row once.

    Rows whose first picture is the same are packed together. Packs are shuffled, sorted by length within large buckets
    (so that a micro-batch needs little padding) and filled into micro-batches, which are shuffled again; so many of
    them as grad_accumulation says have batch_size rows and are a step. A pack that does not fit is split.
    """
    parts = count_step_parts(config)
    size = config.batch_size // parts
    rng = np.random.default_rng([config.seed, epoch])
    by_picture: dict[str, list[int]] = {}
    for i in rng.permutation(len(encoded)).tolist():
        pictures = encoded[i].pictures
        by_picture.setdefault(pictures[0].key if pictures else "", []).append(i)
    pack_size = min(PACK_SIZE, size)
    packs: list[list[int]] = []
    for rows in by_picture.values():
        packs += [rows[start : start + pack_size] for start in range(0, len(rows), pack_size)]
    packs = [packs[i] for i in rng.permutation(len(packs)).tolist()]
    bucket = max(1, BUCKET_SIZE * config.batch_size // pack_size)
    micro_batches: list[MicroBatch] = []
    for start in range(0, len(packs), bucket):
        by_length = sorted(packs[start : start + bucket], key=lambda pack: sum(len(encoded[i].ids) for i in pack))
        micro_batches += _fill_micro_batches(by_length, size)
    micro_batches = [micro_batches[i] for i in rng.permutation(len(micro_batches)).tolist()]
    return [micro_batches[start : start + parts] for start in range(0, len(micro_batches), parts)]


def _fill_micro_batches(packs: Sequence[list[int]], size: int) -> list[MicroBatch]:
    """Micro-batches of `size` rows in the order of the packs; the last one may be smaller."""
    micro_batches: list[MicroBatch] = []
    current: MicroBatch = []
    for pack in packs:
        room = size - sum(map(len, current))
        current.append(pack[:room])
        if len(pack) >= room:
            micro_batches.append(current)
            current = [pack[room:]] if pack[room:] else []
    if current:
        micro_batches.append(current)
    return micro_batches


def _number_members(micro_batch: MicroBatch) -> MicroBatch:
    """The packs with each row replaced by its position in the micro-batch."""
    position = 0
    numbered: MicroBatch = []
    for pack in micro_batch:
        numbered.append(list(range(position, position + len(pack))))
        position += len(pack)
    return numbered
