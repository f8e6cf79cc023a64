"""TRL's own DPOTrainer with its own collator (TRL 1.16.0), to compare the project's trainer with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from clincot.config import TrainConfig
from clincot.models.encoding import read_picture
from clincot.models.vlm import load_checkpoint
from clincot.prompts import Conversation, collect_views
from clincot.training.rows import TrainingRow
from clincot.training.trained_parts import build_lora_config, freeze_modules


def build_messages(conversation: Conversation) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.role,
            "content": [*({"type": "image"} for _ in turn.pictures), {"type": "text", "text": turn.text}],
        }
        for turn in conversation
    ]


def train_stock_dpo(rows: list[TrainingRow], policy_dir: Path, config: TrainConfig, folder: Path) -> list[float]:
    """TRL's own DPOTrainer with its own collator on the same pairs, one loss a step."""
    model, processor = load_checkpoint(str(policy_dir))
    freeze_modules(model, vision=config.freeze_vision, projector=not config.train_projector)
    data = [
        {
            "images": [read_picture(p) for p in collect_views(row.chosen)],
            "prompt": build_messages(row.chosen[:-1]),
            "chosen": build_messages(row.chosen[-1:]),
            "rejected": build_messages(row.rejected[-1:]),
        }
        for row in rows
    ]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder),
            beta=config.beta,
            learning_rate=config.lr,
            lr_scheduler_type="cosine",
            bf16=False,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            use_cpu=True,
            gradient_checkpointing=False,
            seed=config.seed,
            data_seed=config.seed,
            max_length=None,
            logging_steps=1,
            max_grad_norm=config.max_grad_norm,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=processor,
        peft_config=build_lora_config(model, config) if config.lora_r else None,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
