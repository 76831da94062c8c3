"""The stages of the pipeline as plain data, in order; what each of them reads is written at the settings (config.py)."""

from __future__ import annotations

from dataclasses import dataclass

PREPARE, EVALUATE, TRAIN = "prepare", "evaluate", "train"


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    name: of its job, of its result `stages/<name>.json` and of its metrics `<name>/…`. kind: PREPARE, TRAIN or EVALUATE.
    Of stages that train: `checkpoint`, the name of its checkpoints and of its records in metrics.jsonl; `nanochat`, the
    name of the same stage in nanochat's folders; `after`, checkpoints of the stages that it starts from, best first;
    without any it starts from new weights.
    """

    name: str
    kind: str
    checkpoint: str = ""
    nanochat: str = ""
    after: tuple[str, ...] = ()


PREPARE_TEXT = Stage("prepare_text", PREPARE)
TOK_TRAIN = Stage("tok_train", PREPARE)
TOK_EVAL = Stage("tok_eval", EVALUATE)
PREPARE_DATA = Stage("prepare_data", PREPARE)
BASE = Stage("base_train", TRAIN, "base", "base")
BASE_EVAL = Stage("base_eval", EVALUATE)
MEMORY_EVAL = Stage("memory_eval", EVALUATE)
RECALL_EVAL = Stage("recall_eval", EVALUATE)
MID = Stage("mid_train", TRAIN, "mid", "mid", after=("base",))
SFT = Stage("chat_sft", TRAIN, "sft", "chatsft", after=("mid", "base"))
RL = Stage("chat_rl", TRAIN, "rl", "chatrl", after=("sft",))
CHAT_EVAL = Stage("chat_eval", EVALUATE)

STAGES = (
    PREPARE_TEXT,
    TOK_TRAIN,
    TOK_EVAL,
    PREPARE_DATA,
    BASE,
    BASE_EVAL,
    MEMORY_EVAL,
    RECALL_EVAL,
    MID,
    SFT,
    RL,
    CHAT_EVAL,
)
BY_NAME = {stage.name: stage for stage in STAGES}
BY_CHECKPOINT = {stage.checkpoint: stage for stage in STAGES if stage.checkpoint}
NEWEST_FIRST = tuple(reversed(BY_CHECKPOINT))  # names of checkpoints: the most trained stage first

# Who reads a setting: names of stages, or a kind for all stages of that kind.
TRAINING = (TRAIN,)
EVALUATION = (BASE_EVAL.name,)
MEMORY_EVALUATION = (MEMORY_EVAL.name, RECALL_EVAL.name)
ROWS = (PREPARE_DATA.name, TRAIN, BASE_EVAL.name)
TOKENIZER = (TOK_TRAIN.name, TOK_EVAL.name, *ROWS)
TEXT = (PREPARE_TEXT.name, *TOKENIZER)


def among(stage: Stage, readers: tuple[str, ...]) -> bool:
    """Whether a stage is one of these readers."""
    return stage.name in readers or stage.kind in readers
