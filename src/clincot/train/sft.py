"""Supervised fine-tuning on conversations: the small models' lessons, and SFT-on-chosen as a baseline of DPO.

A plain loop in one process. The vision tower stays frozen by default and each picture goes through it once; batches
hold conversations of similar length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from clincot.config import TrainSection
from clincot.models.encoding import Encoded
from clincot.models.features import PictureFeatures
from clincot.models.vlm import VisionLanguageModel
from clincot.records import digest_of
from clincot.train.collate import Batch, ConversationCollator, action_logprobs, features, pixels
from clincot.train.publish import NotFinite, freeze, lora_config, open_partial, publish, tail_means
from clincot.train.rows import SFTRow

LOG_EVERY = 10  # steps
TOWER_MB = 2048  # of tower states kept; the small tower needs 0.16 MB an image
BUCKET = 50  # batches whose rows are sorted by length together
RESUME_FILE = "resume.pt"


def train_on_rows(
    rows: Sequence[SFTRow],
    policy_dir: Path,
    out_dir: Path,
    section: TrainSection,
    *,
    train_connector: bool = True,
    held_out: Sequence[SFTRow] = (),
    progress: bool = True,
) -> dict[str, float]:
    """Train the policy of `policy_dir` on conversations; the new checkpoint appears at `out_dir` when it is done.

    Loss: negative log-probability (nats) of the action tokens, averaged over those of a batch. Reads of `section`: lr,
    epochs, batch_size (conversations), grad_accumulation, warmup_ratio, max_grad_norm, freeze_vision, lora_*, dtype,
    save_steps, seed. `train_connector`: whether the layer between tower and language model learns while the tower is
    frozen; a model from scratch needs it. An interrupted call resumes at its last multiple of save_steps.

    Returns the last tenth's mean loss, rows, steps and, with `held_out`, their loss.
    """
    if not rows:
        raise ValueError("no rows to train on")
    gpu = torch.cuda.is_available()
    policy = VisionLanguageModel(
        policy_dir, device="cuda" if gpu else "cpu", dtype=section.dtype if section.lora_r else "float32"
    )
    run = digest_of(
        [policy.digest, section.digest, train_connector, [[row.name, repr(row.conversation)] for row in rows]]
    )
    partial = open_partial(out_dir, run)
    loop = _Loop(policy, section, train_connector)
    loop.run(rows, partial / RESUME_FILE, progress=progress)
    metrics = {**tail_means(loop.log), "rows": float(len(rows)), "steps": float(loop.step)}
    if held_out:
        metrics["held_out_loss"] = loop.loss_of(held_out)
    publish(loop.model, policy.encoder.processor, policy.views, out_dir, dtype=section.dtype, log=loop.log)
    return metrics


class _Loop:
    """Model, optimiser and log of one run."""

    def __init__(self, policy: VisionLanguageModel, section: TrainSection, train_connector: bool) -> None:
        torch.manual_seed(section.seed)
        self.section = section
        model: Any = policy.model
        freeze(model, vision=section.freeze_vision, connector=section.freeze_vision and not train_connector)
        self.connector: Any = None
        source = pixels(policy.encoder)
        if section.freeze_vision and policy.shares_features:
            source = features(policy.features)
            if train_connector:
                states = PictureFeatures(model, policy.encoder, output="last_hidden_state", kept_mb=TOWER_MB)
                source, self.connector = features(states), model.model.connector
        self.collator = ConversationCollator(policy.encoder, source)
        if section.lora_r:
            from peft import get_peft_model

            model = get_peft_model(model, lora_config(model, section))
        self.model: Any = model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=section.lr, weight_decay=0.0)
        self.log: list[dict[str, float]] = []
        self.step = 0

    def run(self, rows: Sequence[SFTRow], resume: Path, *, progress: bool) -> None:
        section = self.section
        encoded = [
            self.collator.encode(row.conversation, row.name)
            for row in tqdm(rows, desc="encoding", unit="row", disable=not progress)
        ]
        a_step = section.batch_size * section.grad_accumulation
        steps = max(1, round(section.epochs * math.ceil(len(rows) / a_step)))
        schedule = get_cosine_schedule_with_warmup(self.optimiser, math.ceil(section.warmup_ratio * steps), steps)
        if resume.is_file():
            self._resume(resume, schedule)
        self.model.train()
        bar = tqdm(total=steps, initial=self.step, desc="SFT", unit="step", mininterval=1, disable=not progress)
        for chosen in _batches([len(e.ids) for e in encoded], section, start=self.step, stop=steps):
            loss = self._step(
                [[encoded[i] for i in part] for part in chosen], [[rows[i].name for i in p] for p in chosen]
            )
            schedule.step()
            self.step += 1
            self.log.append({"step": self.step, "loss": loss, "learning_rate": schedule.get_last_lr()[0]})
            bar.update()
            if self.step % LOG_EVERY == 0:
                bar.set_postfix(loss=f"{sum(e['loss'] for e in self.log[-LOG_EVERY:]) / LOG_EVERY:.4f}")
            if section.save_steps and self.step % section.save_steps == 0 and self.step < steps:
                self._save(resume, schedule)
        bar.close()

    def loss_of(self, rows: Sequence[SFTRow]) -> float:
        """Mean negative log-probability (nats) of the rows' action tokens, nothing is learned."""
        self.model.eval()
        total, count = 0.0, 0
        for at in range(0, len(rows), self.section.batch_size):
            part = rows[at : at + self.section.batch_size]
            with torch.no_grad():
                encoded = [self.collator.encode(row.conversation, row.name) for row in part]
                logps_SK, actions_SK = self._forward(encoded, [row.name for row in part])
            total -= float(logps_SK.sum())
            count += int(actions_SK.sum())
        return total / count

    def _step(self, parts: Sequence[Sequence[Encoded]], names: Sequence[Sequence[str]]) -> float:
        """One optimiser step over its micro-batches; the mean is over the action tokens of all of them."""
        tokens = sum(sum(e.actions[1:]) for part in parts for e in part)
        total = 0.0
        self.optimiser.zero_grad(set_to_none=True)
        for part, part_names in zip(parts, names, strict=True):
            logps_SK, _ = self._forward(part, part_names)
            bad_S = ~torch.isfinite(logps_SK).all(1)
            if bad_S.any():
                bad = [name for name, is_bad in zip(part_names, bad_S.tolist(), strict=True) if is_bad]
                raise NotFinite(
                    f"step {self.step + 1}: the loss is not finite for {', '.join(bad)}; nothing was published"
                )
            loss = -logps_SK.sum() / tokens
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.section.max_grad_norm)
        if not torch.isfinite(norm):
            raise NotFinite(
                f"step {self.step + 1}: the gradient is not finite, with {', '.join(n for part in names for n in part)}"
            )
        self.optimiser.step()
        return total

    def _forward(self, encoded: Sequence[Encoded], names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.trained[0].device
        batch: Batch = {k: v.to(device) for k, v in self.collator(encoded, names).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.section.dtype == "bfloat16"):
            if self.connector is not None and "features" in batch:
                batch["features"] = self.connector(batch["features"])
            return action_logprobs(self.model, batch)

    def _save(self, path: Path, schedule: Any) -> None:
        aside = path.with_suffix(".writing")
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        state = {"trained": trained, "optimiser": self.optimiser.state_dict(), "schedule": schedule.state_dict()}
        torch.save({**state, "step": self.step, "log": self.log, "random": torch.get_rng_state()}, aside)
        aside.replace(path)

    def _resume(self, path: Path, schedule: Any) -> None:
        state = torch.load(path, weights_only=True, map_location=self.trained[0].device)
        self.model.load_state_dict(state["trained"], strict=False)
        self.optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        self.step, self.log = state["step"], state["log"]
        torch.set_rng_state(state["random"].cpu())


def _batches(lengths: Sequence[int], section: TrainSection, *, start: int, stop: int) -> Iterator[list[list[int]]]:
    """Micro-batches of row indices, step by step from `start`: a function of the seed and the step alone."""
    step, epoch = 0, 0
    while step < stop:
        for micro in _epoch(lengths, section, epoch):
            if step >= stop:
                return
            if step >= start:
                yield micro
            step += 1
        epoch += 1


def _epoch(lengths: Sequence[int], section: TrainSection, epoch: int) -> list[list[list[int]]]:
    rng = np.random.default_rng([section.seed, epoch])
    a_step = section.batch_size * section.grad_accumulation
    order = rng.permutation(len(lengths)).tolist()
    steps = []
    for at in range(0, len(order), BUCKET * a_step):
        bucket = sorted(order[at : at + BUCKET * a_step], key=lambda i: lengths[i])
        steps += [bucket[i : i + a_step] for i in range(0, len(bucket), a_step)]
    rng.shuffle(steps)
    return [[s[i : i + section.batch_size] for i in range(0, len(s), section.batch_size)] for s in steps]
