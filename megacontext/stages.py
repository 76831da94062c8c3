"""The stages of the pipeline as plain data, in order; what each of them reads is written at the settings (config.py)."""

from __future__ import annotations

from dataclasses import dataclass

PREPARE, EVALUATE, TRAIN = "prepare", "evaluate", "train"


@dataclass(frozen=True)
class Stage:
    """`name`: of its result `stages/<name>.json` and of its metrics. `kind`: PREPARE, TRAIN or EVALUATE.
    `checkpoint`: the name of its checkpoints and of its records in metrics.jsonl, for stages that train."""

    name: str
    kind: str
    checkpoint: str = ""


STAGES = (
    Stage("prepare_text", PREPARE),
    Stage("tok_train", PREPARE),
    Stage("tok_eval", EVALUATE),
    Stage("prepare_data", PREPARE),
    Stage("base_train", TRAIN, "base"),
    Stage("base_eval", EVALUATE),
    Stage("memory_eval", EVALUATE),
    Stage("recall_eval", EVALUATE),
    Stage("mid_train", TRAIN, "mid"),
    Stage("chat_sft", TRAIN, "sft"),
    Stage("chat_rl", TRAIN, "rl"),
    Stage("chat_eval", EVALUATE),
)
BY_NAME = {stage.name: stage for stage in STAGES}

# Stages by the settings that they read.
TEXT = ("prepare_text", "tok_train", "tok_eval", "prepare_data", "base_train", "base_eval")
TOKENIZER = ("tok_train", "tok_eval", "prepare_data", "base_train", "base_eval")
ROWS = ("prepare_data", "base_train", "base_eval")
TRAINING = ("base_train",)
EVALUATION = ("base_eval",)
