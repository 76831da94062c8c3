"""Every setting of a run, once: its default, its unit and what it does.

Sections are frozen dataclasses; a job puts the sections it needs into its command line (`jobs/runtime/cli.py`).
Tiers are overrides of these defaults and nothing else. Secrets are never settings: they come from the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megacontext import arguments
from megacontext.errors import UserError
from megacontext.flags import Section, flag
from megacontext.memory_config import FocusConfig as FocusConfig
from megacontext.memory_config import MemoryConfig as MemoryConfig
from megacontext.stages import EVALUATION, ROWS, TEXT, TOKENIZER, TRAINING

MAX_RUN_NAME_BYTES = 200  # file systems allow 255, and temporary names are longer than the final ones
MIN_VOCAB_SIZE = 265  # 256 bytes and 9 special tokens
_free = partial(flag, decides=())  # a setting on which no result depends
_machine = partial(flag, machine=True)


def default_base_dir() -> str:
    """`NANOCHAT_BASE_DIR`, or `~/.cache/nanochat`. Raises UserError where neither the variable nor a home folder is there."""
    given = os.environ.get("NANOCHAT_BASE_DIR")
    home = os.path.expanduser("~")
    if not given and home == "~":
        raise UserError(
            "there is no home folder: HOME is not set, and the system does not know the user id of this process. "
            "Set NANOCHAT_BASE_DIR to a folder for data, tokenizer and runs."
        )
    return given or os.path.join(home, ".cache", "nanochat")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of a GPT; the field names are those of nanochat's `model_config`, so its meta files load as they are."""

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    token_shift: bool = False  # each embedding also carries the token before it; not in nanochat

    def __post_init__(self) -> None:
        arguments.plain_fields(self)  # every value has its type
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"n_embd {self.n_embd} over n_head {self.n_head} heads must give an even whole head width; "
                "choose a width that is a multiple of 2·n_head."
            )
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}.")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        vocab_size: int,
        sequence_len: int,
        width: int = 0,
        n_kv_head: int = 0,
        token_shift: bool = False,
    ) -> GPTConfig:
        """The one dial: width 64·depth unless given; heads of 128, of 64 below depth 4 or where 128 gives fewer than two."""
        n_embd = width or 64 * depth
        head_dim = 128 if depth >= 4 and n_embd % 128 == 0 and n_embd >= 256 else 64
        n_head = max(1, n_embd // head_dim)
        return cls(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=n_head,
            n_kv_head=n_kv_head or n_head,
            n_embd=n_embd,
            token_shift=token_shift,
        )


def run_name_problem(name: str) -> str:
    """Why a text cannot be the name of a run's folder on every storage, as the end of a sentence; empty when it can."""
    if not name.strip():
        return "it must not be empty"
    if name in (".", ".."):
        return "it would be the folder of the runs, or the folder above it"
    wrong = sorted({letter for letter in name if letter in '/\\*?[]"<>|' or not letter.isprintable()})
    if wrong:
        return f"it must not contain {' '.join(map(ascii, wrong))}"
    if "::" in name:
        return "it must not contain '::', which joins two storages"
    size = len(name.encode())
    return f"it has {size} bytes and may have {MAX_RUN_NAME_BYTES}" if size > MAX_RUN_NAME_BYTES else ""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section, stages=TRAINING):
    """Who the run is, where it lives and what it runs on."""

    run: str = _machine("speedrun", "name of the run; the same name continues where it stopped", first=True)
    tier: str = flag(
        "auto",
        "size preset; auto is cpu without a GPU, else by GPU",
        ("auto", "cpu", "5090", "h100", "speedrun", "run1000"),
        stages=TEXT,
        decides=(),  # what it stands for is compared: the text, and every setting by itself
        first=True,
    )
    base_dir: str = _machine(
        "", "folder for shards, tokenizer and runs (default: NANOCHAT_BASE_DIR or ~/.cache/nanochat)", first=True
    )
    storage: str = _machine("", "folder or fsspec URI that holds runs (default: <base_dir>/runs)")
    init_from: str = flag(
        "",
        "start from a trained model, ours or nanochat's: a run, a checkpoint or a nanochat base directory, or its URI; "
        "its shape and tokenizer are taken over; with --mc it gets a memory",
        stages=TOKENIZER,
        first=True,
    )
    seed: int = flag(1337, "seed of initialization, data order and sampling", high=2**63 - 1)
    num_workers: int = _machine(0, "training processes; 0 is one per GPU of the cluster, or 1 without GPUs")
    cpus_per_worker: int = _machine(0, "CPU cores a training process may use; 0 shares the cores of the machine")
    launcher: str = _machine(
        "ray", "who starts the training processes; local is this process (or torchrun's), without Ray", ("ray", "local")
    )
    max_failures: int = _machine(3, "restarts of the worker group after a crash before the job gives up")
    device: str = _machine("auto", "where training runs", ("auto", "cpu", "cuda"))
    dtype: str = flag(
        "auto",
        "compute dtype; auto is bf16 where the hardware has it natively, else fp32",
        ("auto", "fp32", "bf16"),
        stages=TRAINING + EVALUATION,
    )
    compile: str = _free("auto", "torch.compile; auto is on for GPUs, off on CPUs", ("auto", "on", "off"))
    wandb: str = _machine(
        "auto",
        "Weights & Biases; auto is online with WANDB_API_KEY set, else off",
        ("auto", "online", "offline", "off"),
        first=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        problem = run_name_problem(self.run)
        if problem:
            raise UserError(f"--run is {self.run!r}; {problem}. The name of a run is the name of its folder.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section, stages=ROWS):
    """Text, tokenizer and token shards."""

    data_dir: str = flag(
        "",
        "folder or fsspec URI of parquet shards with a `text` column, last shard = validation; empty: the tier's own data",
        stages=TEXT,
        first=True,
    )
    data_shards: int = flag(0, "training shards to download, in tiers that download", stages=TEXT)
    vocab_size: int = flag(
        32768,
        "tokens in the vocabulary, the nine special ones included",
        low=MIN_VOCAB_SIZE,
        stages=TOKENIZER,
        shape=True,
        first=True,
    )
    tok_max_chars: int = flag(
        2_000_000_000, "characters of text the tokenizer is trained on at most", low=1, stages=TOKENIZER
    )
    tok_doc_cap: int = flag(
        10_000, "characters taken of one document when training the tokenizer", low=1, stages=TOKENIZER
    )
    min_doc_chars: int = flag(
        0, "characters below which a training document is left out; only long ones have far context to learn from"
    )
    max_seq_len: int = flag(2048, "tokens of a training row, T; shards hold rows of T+1", low=2)
    verify_shards: int = _free(
        1,
        "check every token shard's checksum before training and before base_eval (0 or 1)",
        high=1,
        stages=TRAINING + EVALUATION,
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, stages=TRAINING):
    """The one dial and its few overrides."""

    depth: int = flag(20, "layers; width is 64·depth, heads of 128 (64 below depth 4)", low=1, shape=True, first=True)
    width: int = flag(0, "model width; 0 derives it from depth", shape=True)
    n_kv_head: int = flag(0, "key/value heads; 0 is one per query head", shape=True)
    token_shift: int = flag(
        0,
        "mix each token's embedding with that of the token before it; recall is learned sooner; not in nanochat (0 or 1)",
        high=1,
        shape=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section, stages=TRAINING):
    """Horizon, batch, optimizers and the habits of the loop. Defaults are nanochat's 2025 recipe."""

    num_iterations: int = flag(
        -1, "optimizer steps; -1: by target_flops, then max_minutes, then target_param_data_ratio", low=-1, first=True
    )
    target_flops: float = flag(-1.0, "training FLOPs to spend; -1 is off", above=0, off=-1)
    max_minutes: float = flag(
        -1.0,
        "size the horizon so that training takes about this long on this machine, in minutes; -1 is off",
        above=0,
        off=-1,
        first=True,
    )
    min_tokens: int = flag(
        0,
        "fewest training tokens of a run that max_minutes sizes; where fewer fit, training takes longer and says so. "
        "A --max_minutes on the command line makes this 0, unless it is given too",
    )
    target_param_data_ratio: float = flag(20.0, "training tokens per parameter; -1 is off", above=0, off=-1)
    device_batch_size: int = _free(
        32, "rows per forward pass of one worker", low=1, stages=TRAINING + EVALUATION, first=True
    )
    total_batch_size: int = flag(524288, "tokens per optimizer step over all workers", low=1)
    embedding_lr: float = flag(0.2, "AdamW learning rate of the embedding at width 768")
    unembedding_lr: float = flag(0.004, "AdamW learning rate of the output head at width 768")
    matrix_lr: float = flag(0.02, "Muon learning rate of the block matrices")
    weight_decay: float = flag(0.0, "AdamW weight decay")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 is no clipping")
    warmup_ratio: float = flag(0.0, "share of the steps with a rising learning rate", high=1)
    warmdown_ratio: float = flag(0.2, "share of the steps with a falling learning rate", high=1)
    final_lr_frac: float = flag(0.0, "learning rate at the end, as a share of the peak", high=1)
    eval_every: int = _free(250, "steps between validations; -1 validates at the end only", low=1, off=-1)
    eval_tokens: int = flag(
        20 * 524288,
        "tokens of one validation; all of them if there are fewer",
        low=1,
        stages=TRAINING + EVALUATION,
        decides=EVALUATION,
    )
    sample_every: int = _free(2000, "steps between printed samples; -1 samples at the end only", low=1, off=-1)
    save_every: int = _free(1000, "steps between checkpoints; -1 saves at the end only", low=1, off=-1)
    keep_checkpoints: int = _free(2, "newest checkpoints kept; the best by validation is kept as well; 0 keeps all")
    log_every: int = _free(1, "steps between printed lines; metrics.jsonl has every step", low=1)
    log_rows: int = _free(0, "write the ids of the rows of every step to rows/<stage>_rank<r>.jsonl (0 or 1)", high=1)
    stream: str = _free(
        "auto",
        "how rows reach the workers: Ray Data, or a memory map of the same rows; auto is ray under Ray",
        ("auto", "ray", "mmap"),
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section, stages=EVALUATION):
    """What is measured after training."""

    eval_bundle: str = flag(
        "", "folder with core.yaml, eval_meta_data.csv and eval_data/ for CORE; empty skips CORE", first=True
    )
    core_max_per_task: int = flag(500, "items per CORE task; -1 is all", low=1, off=-1)
    sample_tokens: int = flag(32, "tokens of each printed sample", low=1)


TIERS: Mapping[str, Mapping[str, Any]] = {
    "cpu": dict(depth=4, width=128, max_seq_len=512, vocab_size=8192, device_batch_size=8, total_batch_size=4096,
                max_minutes=7.0, min_tokens=1_000_000, warmdown_ratio=0.5, eval_every=200, eval_tokens=65_536, sample_every=-1,
                save_every=100, log_every=10, core_max_per_task=20),
    "5090": dict(depth=12, device_batch_size=16, data_shards=110),
    "h100": dict(depth=12, device_batch_size=32, data_shards=110),
    "speedrun": dict(depth=20, device_batch_size=32, data_shards=240),
    "run1000": dict(depth=32, device_batch_size=8, data_shards=800),
}  # fmt: skip

# What --mc implies in a tier. Recall needs the token shift and generated tasks. On CPUs a model of half the depth and a
# quarter of the vocabulary learns it in a quarter of an hour (jobs/records/2026-11-27_cpu_tier.md).
_RECALL: Mapping[str, Any] = dict(token_shift=1, mc_recall_share=0.25)
MC_IMPLIES: Mapping[str, Mapping[str, Any]] = {
    "cpu": dict(token_shift=1, mc_recall_share=0.5, depth=2, vocab_size=2048, max_minutes=10.0, min_tokens=2_457_600, warmdown_ratio=0.4,
                mc_num_random_variants=1, allocator_recent_tokens=32, routing_slots=8, routing_width=32),
    "5090": _RECALL, "h100": _RECALL, "speedrun": _RECALL, "run1000": _RECALL,
}  # fmt: skip


def preset(tier: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a tier, below those that a user or a run has chosen: with a memory, what it implies as well.

    Minutes that are chosen are kept: the tier's `min_tokens` then do not lengthen them.
    """
    values = {**TIERS[tier], **(MC_IMPLIES[tier] if chosen.get("mc") else {})}
    if "max_minutes" in chosen:
        values.pop("min_tokens", None)
    return values
