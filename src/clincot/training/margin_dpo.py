"""Margin-aware DPO on TRL's DPOTrainer, for pairs whose sides show different crops.

TRL provides the training loop, checkpoints, LoRA and mixed precision. This module adds the collator (each side has its
own pictures), the loss (a margin, an NLL anchor, image-conditional pairs) and the reference log-probabilities. The
reference is the policy at the start of the round; its log-probabilities are computed once before the first step, so no
second model is kept in memory. Three private names of TRL 1.16.0 are overridden (`_prepare_dataset`,
`_precompute_ref_logps`, `_save_checkpoint`); the version is pinned, and tests compare the loss with stock DPO.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import DPOConfig, DPOTrainer

from clincot.clients.trackers import check_trackers
from clincot.config import TrainConfig
from clincot.errors import InvalidInput
from clincot.models.vlm import VisionLanguageModel
from clincot.records import hash_json
from clincot.training.checkpoint_writer import (
    NonFiniteError,
    average_last_steps,
    build_cosine_schedule,
    get_events_folder,
    get_partial_folder,
    name_training_run,
    open_partial_folder,
    save_checkpoint,
)
from clincot.training.collate import (
    Batch,
    ConversationCollator,
    PairCollator,
    PictureTensors,
    compute_action_logprobs,
    make_feature_source,
    make_pixel_source,
    make_tower_source,
    supports_packing,
)
from clincot.training.distributed import DistributedCollator, ProcessGroup, average_batch
from clincot.training.fsdp import check_sharded, gather_weights, is_fsdp_enabled
from clincot.training.gradient_probe import can_probe, list_probe_steps, measure_terms
from clincot.training.image_conditional import blank_crops
from clincot.training.margin import margin_dpo_loss, margin_logits, margin_nats
from clincot.training.resolved_settings import (
    Device,
    ResolvedSettings,
    count_checkpoint_parameters,
    count_parameters,
    count_step_parts,
    describe_settings,
    log_settings,
    resolve_settings,
)
from clincot.training.rows import TrainingRow, select_chosen_rows
from clincot.training.sft import train_on_rows
from clincot.training.term_summary import TermSummary, summarize_terms
from clincot.training.trained_parts import (
    build_lora_config,
    find_projectors,
    freeze_modules,
    get_base_model,
    keep_trained_weights_in_float32,
    may_leave_parameters_unused,
    set_projector_rate,
)

# Shape suffixes: B pairs, S sides of a pair (2, or 3 with image-conditional pairs), N conversations (S * B, ordered as
# in PairCollator).

COMPLETE_MARKER = "complete"  # file in a resumable checkpoint that was written completely

_log = logging.getLogger(__name__)


def train_on_pairs(
    rows: Sequence[TrainingRow], policy_dir: Path, out_dir: Path, config: TrainConfig, *, progress: bool = True
) -> dict[str, float]:
    """Train the policy of `policy_dir` on preference pairs; the finished checkpoint appears at `out_dir`.

    Returns the metrics of the training log, averaged over the last tenth of the steps, and the counts. With
    `config.loss` "sft" it trains on the chosen sides only. An interrupted call with the same arguments resumes from the
    last checkpoint of `config.save_steps`. Equal rows, policy and configuration give the same bytes (on the CPU of one
    machine). Raises InvalidInput without rows, NonFiniteError for a loss or gradient that is NaN or infinite.
    """
    if all(row.anchor for row in rows):
        raise InvalidInput("no pairs to train on; lower pair.min_gap or ask more questions")
    check_trackers(config.report_to, setting="train.report_to")
    if config.loss == "sft":
        return train_on_rows(select_chosen_rows(rows), policy_dir, out_dir, config, progress=progress)
    settings = resolve_settings(config, count_checkpoint_parameters(policy_dir), Device.detect())
    policy, partial = load_policy_to_train(policy_dir, settings), get_partial_folder(out_dir)
    process_group = ProcessGroup.from_torch()
    process_group.on_main_process(lambda: log_settings(settings))
    run = hash_json([policy.digest, config.digest, describe_settings(settings), [repr(row) for row in rows]])
    process_group.on_main_process(lambda: open_partial_folder(out_dir, run))
    trainer = MarginDPOTrainer(policy, rows, config, partial, progress=progress and process_group.is_main_process)
    trainer.train(resume_from_checkpoint=_find_last_checkpoint(partial))
    log = trainer.read_history()
    terms = summarize_terms(log)
    process_group.on_main_process(lambda: _log_warnings(terms))
    weights = gather_weights(trainer)
    process_group.on_main_process(
        lambda: save_checkpoint(
            trainer.model,
            policy.encoder.processor,
            policy.views,
            out_dir,
            settings=trainer.settings,
            log=log,
            weights=weights,
        )
    )
    shares = {"preference_share": terms.preference_share, "margin_share": terms.margin_share}
    anchors = sum(row.anchor for row in rows)
    return {
        **average_last_steps(log),
        **{name: share for name, share in shares.items() if share is not None},
        **({"anchors": float(anchors)} if anchors else {}),
        "pairs": float(len(rows) - anchors),
        "steps": float(trainer.state.global_step),
    }


class MarginDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer with per-side pictures, a margin, an NLL anchor and a precomputed reference."""

    def __init__(
        self,
        policy: VisionLanguageModel,
        rows: Sequence[TrainingRow],
        config: TrainConfig,
        folder: Path,
        *,
        progress: bool = False,
    ) -> None:
        self.config, self.rows, self.progress, self.process_group = config, rows, progress, ProcessGroup.from_torch()
        self.process_group.per_process_batch(config.batch_size)
        self._metric_values: defaultdict[str, list[float]] = defaultdict(list)
        self._pairs_in_step: list[str] = []  # pairs since the last log line, named if the gradient is not finite
        self.settings = resolve_settings(config, count_parameters(policy.model), Device.detect())
        freeze_modules(policy.model, vision=config.freeze_vision, projector=not config.train_projector)
        # the tower of a sharded model is complete only inside the model's forward pass
        shared = config.freeze_vision and policy.has_frames and not is_fsdp_enabled()
        self._projects_features = shared and config.train_projector
        conversations = ConversationCollator(
            policy.encoder, self._choose_pictures(policy, shared), packed=shared and supports_packing(policy.model)
        )
        blanked = (
            [blank_crops(row.chosen, folder / f"blank-{self.process_group.rank}") for row in rows]
            if config.image_pair_weight
            else []
        )
        margins = [margin_logits(row.gap, row.spread, config) for row in rows]
        self._largest_margin = max(margins)
        super().__init__(
            model=policy.model,
            args=_build_arguments(config, self.settings, folder, unused=may_leave_parameters_unused(policy.model)),
            data_collator=DistributedCollator(
                PairCollator(rows, margins, conversations, blanked=blanked), self.process_group
            ),
            train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
            processing_class=policy.encoder.processor,
            peft_config=build_lora_config(policy.model, self.settings) if self.settings.lora_r else None,
        )
        keep_trained_weights_in_float32(self.model)
        check_sharded(self)
        self._trained_weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._can_probe = can_probe(self._trained_weights, sharded=is_fsdp_enabled())
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_ProgressBar(progress))
        if "tensorboard" in config.report_to:
            events = TensorBoardCallback()  # its default folder is the training's own, which is removed at the end
            events.logging_dir = events.logging_dir or str(get_events_folder(folder))
            self.add_callback(events)

    def _choose_pictures(self, policy: VisionLanguageModel, shared: bool) -> PictureTensors:
        """What a batch holds of its pictures: pixels, features, or the tower's states if only the tower is fixed."""
        if not shared:
            return make_pixel_source(policy.encoder)
        if not self._projects_features:
            return make_feature_source(policy.encode_pictures)
        return make_tower_source(policy, self.settings.weights_dtype)

    def _project_features(self, batch: Batch) -> Batch:
        """The batch with the projector applied to the states of the tower, if it is trained."""
        if not self._projects_features or "features" not in batch:
            return batch
        (projector,) = find_projectors(get_base_model(self.accelerator.unwrap_model(self.model))).values()
        with self.accelerator.autocast():
            return {**batch, "features": projector(batch["features"])}

    def create_optimizer(self, model: Any = None) -> Any:
        """TRL's optimiser, with the projector's own learning rate where it has one."""
        created = self.optimizer is None
        optimiser = super().create_optimizer(model)
        if created and self.settings.train_projector and self.settings.projector_lr != self.settings.lr:
            set_projector_rate(optimiser, self.model, self.settings.projector_lr)
        return optimiser

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """Return the data set unchanged: the collator encodes the conversations."""
        return dataset

    def get_train_dataloader(self) -> DataLoader[Any]:
        """TRL's loader, but with whole batches on every process, because the collator takes the slices."""
        return self.process_group.keep_whole_batches(super().get_train_dataloader())

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Add `ref_logps` to the data set, one value (nats) for each side. TRL calls this before the first step."""
        loader = self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_size=self.process_group.per_process_batch(batch_size),
                collate_fn=self.data_collator.collator,
                shuffle=False,
            )
        )
        batches = tqdm(loader, desc="reference log-probabilities", disable=None if self.progress else True)
        ref_BS = torch.cat(
            [self.accelerator.gather_for_metrics(self.compute_reference_logps(batch)).cpu() for batch in batches]
        )
        finite_B = torch.isfinite(ref_BS).all(1).tolist()
        bad = [row.pair for row, finite in zip(self.rows, finite_B, strict=True) if not finite]
        if bad:
            raise NonFiniteError(
                f"reference log-probabilities are not finite for {len(bad)} of {len(self.rows)} pairs: "
                f"{', '.join(bad)}; the policy cannot express these answers, or its weights are damaged"
            )
        return dataset.add_column("ref_logps", ref_BS.tolist())

    def compute_reference_logps(self, batch: Batch) -> torch.Tensor:
        """(B, S) log-probabilities (nats) under the starting policy: this model before any step, adapters off."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        base = getattr(model, "disable_adapter", torch.no_grad)
        with torch.no_grad(), base(), self.accelerator.autocast():
            projected = self._project_features(batch)
            logps_N = compute_action_logprobs(model, projected, self.data_collator.sides * len(batch["row"])).sum_N
        return logps_N.reshape(-1, len(batch["row"])).T.contiguous()

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Mean over the batch of margin-DPO + nll_weight · NLL(chosen) + image_pair_weight · image-conditional DPO.

        The preference terms of an anchor are 0: both of its sides are one answer.
        The NLL term anchors the chosen side: DPO alone can lower both sides as long as the rejected one falls faster.
        """
        if return_outputs:
            raise NotImplementedError("this trainer only trains with margin-DPO; it does not evaluate")
        config, pairs = self.config, len(inputs["row"])
        logprobs = compute_action_logprobs(model, self._project_features(inputs), self.data_collator.sides * pairs)
        logps_SB, ref_SB = logprobs.sum_N.reshape(-1, pairs), inputs["ref_logps"].reshape(-1, pairs)
        margin_B, is_pair_B = inputs["margin"], inputs["is_pair"]
        preference_B = is_pair_B * margin_dpo_loss(
            logps_SB[0], logps_SB[1], ref_SB[0], ref_SB[1], margin_B, config.beta
        )
        nll_B = logprobs.nll_N[:pairs]
        total_B = preference_B + config.nll_weight * nll_B
        others = [config.nll_weight * average_batch(nll_B, inputs)]
        no_margin_B = torch.zeros_like(margin_B)
        if config.image_pair_weight:
            image_B = is_pair_B * margin_dpo_loss(
                logps_SB[0], logps_SB[2], ref_SB[0], ref_SB[2], no_margin_B, config.beta
            )
            total_B = total_B + config.image_pair_weight * image_B
            others.append(config.image_pair_weight * average_batch(image_B, inputs))
            self._record_metrics(inputs, image_pair_loss=image_B)
        self._pairs_in_step += [self.rows[int(index)].pair for index in inputs["row"]]
        self._check_finite(total_B, inputs["row"])
        if self._is_probe_step():
            without_B = is_pair_B * margin_dpo_loss(
                logps_SB[0], logps_SB[1], ref_SB[0], ref_SB[1], no_margin_B, config.beta
            )
            terms = (average_batch(preference_B, inputs), average_batch(without_B, inputs))
            for name, share in measure_terms(*terms, others, self._trained_weights).items():
                self._metric_values[name].append(share)
        reward_B = is_pair_B * config.beta * ((logps_SB[0] - ref_SB[0]) - (logps_SB[1] - ref_SB[1]))
        self._record_metrics(
            inputs,
            nll=nll_B,
            pair_share=is_pair_B,
            dpo_loss=preference_B,
            reward_margin=reward_B,
            reward_margin_square=reward_B.square(),
            accuracy=(reward_B > 0).float(),
            chosen_logps=is_pair_B * logps_SB[0],
            rejected_logps=is_pair_B * logps_SB[1],
            margin_logits=margin_B,
            margin_nats=margin_nats(margin_B, config.beta),
        )
        return average_batch(total_B, inputs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The cosine schedule of checkpoint_writer.build_cosine_schedule."""
        if self.lr_scheduler is None:  # type: ignore[has-type]
            self.lr_scheduler = build_cosine_schedule(
                optimizer or self.optimizer, self.config.warmup_ratio, num_training_steps
            )
        return self.lr_scheduler

    def _is_probe_step(self) -> bool:
        return self._can_probe and self.state.global_step in list_probe_steps(self.state.max_steps)

    def _record_metrics(self, batch: Batch, **metrics: Any) -> None:
        """Store a step's means for the next log line; `reward_margin` and `accuracy` exclude the added margin.

        Values of pairs are 0 for anchors here; _average_over_pairs divides their means by the share of pairs.
        """
        for name, value_B in metrics.items():
            self._metric_values[name].append(float(average_batch(value_B.detach().float(), batch)))

    def _check_finite(self, total_B: torch.Tensor, row_B: torch.Tensor) -> None:
        bad = self.process_group.gather_unique(
            [self.rows[int(index)].pair for index in row_B[~torch.isfinite(total_B)]]
        )
        if bad:
            batch = self.process_group.gather_unique([self.rows[int(index)].pair for index in row_B])
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the loss is not finite for {len(bad)} of {len(batch)} pairs: "
                f"{', '.join(bad)}; no checkpoint was written. Lower train.lr or inspect the pairs (clincot show <id>)"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step with the recorded metrics; raises NonFiniteError for a gradient that is NaN or infinite."""
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            pairs = ", ".join(self._pairs_in_step)
            raise NonFiniteError(
                f"step {self.state.global_step}: the gradient is not finite, with {pairs}; no checkpoint was written. "
                "Lower train.lr or inspect these pairs (clincot show <id>)"
            )
        logs |= self.process_group.average_metrics(
            {name: sum(values) / len(values) for name, values in self._metric_values.items()}
        )
        if "pair_share" in logs:
            logs |= {"margin_logits_max": self._largest_margin}
            _average_over_pairs(logs)
        self._metric_values.clear()
        self._pairs_in_step.clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a resumable checkpoint, without TRL's model card, and mark it as complete."""
        Trainer._save_checkpoint(self, model, trial)
        self.process_group.wait_for_everyone()  # every process has written its part
        self.process_group.on_main_process(
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE_MARKER).touch
        )

    def read_history(self) -> list[dict[str, float]]:
        """One entry for each step: the content of train_log.json."""
        steps = (entry for entry in self.state.log_history if "nll" in entry)  # the last entry sums up the run
        return [_select_logged_metrics(entry) for entry in steps]


def _log_warnings(terms: TermSummary) -> None:
    for warning in terms.list_warnings():
        _log.warning(warning)


_LOGGED_METRICS = (
    "step",
    "epoch",
    "loss",
    "dpo_loss",
    "nll",
    "image_pair_loss",
    "reward_margin",
    "accuracy",
    "chosen_logps",
    "rejected_logps",
    "margin_logits",
    "margin_nats",
    "margin_logits_max",
    "reward_margin_std",
    "preference_share",
    "margin_share",
    "grad_norm",
    "learning_rate",
)


_PAIR_METRICS = (
    "dpo_loss",
    "image_pair_loss",
    "reward_margin",
    "reward_margin_square",
    "accuracy",
    "chosen_logps",
    "rejected_logps",
    "margin_logits",
    "margin_nats",
)


def _average_over_pairs(logs: dict[str, float]) -> None:
    """Turn means over all rows of a step into means over its pairs, and the mean square of β·Δ into its spread.

    A step without any pair keeps none of them.
    """
    share = logs.pop("pair_share")
    means = {name: logs.pop(name) / share for name in _PAIR_METRICS if name in logs and share > 0}
    for name in _PAIR_METRICS:
        logs.pop(name, None)
    if means:
        square = means.pop("reward_margin_square")
        means["reward_margin_std"] = math.sqrt(max(0.0, square - means["reward_margin"] ** 2))
    logs |= means


def _select_logged_metrics(entry: Mapping[str, float]) -> dict[str, float]:
    return {name: entry[name] for name in _LOGGED_METRICS if name in entry}


class _ProgressBar(TrainerCallback):  # type: ignore[misc]
    """A progress bar with the loss; Trainer's own bar prints every log line."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="margin-DPO",
            unit="step",
            disable=None if self.shown else True,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if "nll" in logs:
            self.bar.update(state.global_step - self.bar.n)
            accuracy = f"{logs['accuracy']:.2f}" if "accuracy" in logs else "no pairs"
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", accuracy=accuracy)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def _build_arguments(config: TrainConfig, settings: ResolvedSettings, folder: Path, *, unused: bool) -> DPOConfig:
    """TRL's arguments. unused: whether a forward pass may skip trained parameters.

    Its batch is a part of a step, over all processes together (DistributedCollator).
    """
    gpu = torch.cuda.is_available()
    parts = count_step_parts(config, ProcessGroup.from_torch().size)
    return DPOConfig(
        output_dir=str(folder),
        beta=config.beta,
        learning_rate=config.lr,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // parts,
        gradient_accumulation_steps=parts,
        max_grad_norm=config.max_grad_norm,
        bf16=settings.dtype == "bfloat16",
        fp16=False,
        use_cpu=not gpu,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=config.seed,
        data_seed=config.seed,
        # TRL's default searches the graph of every step for unused parameters.
        ddp_find_unused_parameters=None if unused else False,
        dataloader_num_workers=0,
        dataloader_pin_memory=gpu,
        max_length=None,  # a cut sequence would lose image tokens
        precompute_ref_log_probs=True,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        run_name=name_training_run(folder),
        report_to=[name for name in config.report_to if name != "tensorboard"] or "none",
        disable_tqdm=True,
    )


def load_policy_to_train(policy_dir: Path, settings: ResolvedSettings) -> VisionLanguageModel:
    """The policy to train, in fp32 unless it is the frozen base of a LoRA: small updates are lost in bf16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return VisionLanguageModel(policy_dir, device=device, dtype=settings.weights_dtype)


def _find_last_checkpoint(folder: Path) -> str | None:
    """The complete checkpoint of the highest step; one whose writing was interrupted has no marker."""
    complete = [marker.parent for marker in folder.glob(f"checkpoint-*/{COMPLETE_MARKER}")]
    last = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if last is None else str(last)
