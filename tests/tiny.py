"""A run small enough to train in a second: a tokenizer, token shards and a task around them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megacontext.config import GPTConfig, TrainConfig
from megacontext.data.shards import Manifest, ids_dtype, write_shard
from megacontext.data.tokenizer import Tokenizer
from megacontext.train.task import TrainTask

SEQ_LEN, ROWS = 32, 96

TRAIN = TrainConfig(
    num_iterations=12,
    device_batch_size=2,
    total_batch_size=4 * SEQ_LEN,
    eval_every=4,
    eval_tokens=8 * SEQ_LEN,
    sample_every=-1,
    save_every=3,
    keep_checkpoints=3,
    log_rows=1,
)


def make_tokenizer(directory: Path) -> Tokenizer:
    """A vocabulary of 300 ids, saved in nanochat's layout."""
    text = "the quick brown fox jumps over the lazy dog and runs away from the old house " * 20
    tokenizer = Tokenizer.train([text], 300)
    tokenizer.save(str(directory))
    return tokenizer


def make_shards(directory: Path, tokenizer: Tokenizer, rows: int = ROWS, seed: int = 0, shards: int = 2) -> None:
    """Rows of a noisy repeating pattern, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    infos = []
    for index in range(shards):
        ids = (np.arange(SEQ_LEN + 1) * 7 + generator.integers(0, 50, (rows // shards, 1))) % 250
        noise = generator.random(ids.shape) < 0.1
        ids = np.where(noise, generator.integers(0, 250, ids.shape), ids)
        ids[:, 0] = tokenizer.bos_id
        name = f"shard_{index:05d}.arrow"
        infos.append(write_shard(str(directory / name), {"ids": ids.astype(ids_dtype(tokenizer.vocab_size))}))
    kept = rows * SEQ_LEN
    Manifest(
        version=1, split=directory.name, row_tokens=SEQ_LEN + 1, dtype="uint16", vocab_size=tokenizer.vocab_size,
        tokenizer_digest=tokenizer.digest, columns=("ids",), shards=tuple(infos), documents=rows, tokens_in=kept,
        tokens_kept=kept, source={},
    ).write(str(directory))  # fmt: skip


def make_task(folder: Path, run: str = "run", **overrides: Any) -> TrainTask:
    """A task in `folder`; tokenizer and shards are made on first use. Overrides name TrainTask or TrainConfig fields."""
    if not (folder / "tokenizer").exists():
        tokenizer = make_tokenizer(folder / "tokenizer")
        make_shards(folder / "train", tokenizer)
        make_shards(folder / "val", tokenizer, rows=16, seed=1, shards=1)
    train = replace(TRAIN, **{key: overrides.pop(key) for key in list(overrides) if hasattr(TRAIN, key)})
    task = TrainTask(
        stage="base",
        run_dir=str(folder / run),
        train_tokens_dir=str(folder / "train"),
        val_tokens_dir=str(folder / "val"),
        tokenizer_dir=str(folder / "tokenizer"),
        gpt=GPTConfig(sequence_len=SEQ_LEN, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=32),
        train=train,
        seed=5,
        dtype="fp32",
        compile="off",
    )
    return replace(task, **overrides)
