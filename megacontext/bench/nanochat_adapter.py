"""Drives this project's model with a benchmark harness written for nanochat checkouts.

The harness imports this file and calls `Adapter`: `build` a model, `stepper` for its optimizer, `generator`, `loader`.
Text, tokenizer, batches, shape and thread count are the harness's; dtype comes from NANOCHAT_DTYPE (as the harness sets
it) or, with MC_BENCH_DTYPE=auto, from our own choice. Compiling is ours as well, so run the harness with `--compile 0`
and MC_BENCH_COMPILE=on to compile.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from megacontext import precision
from megacontext.config import GPTConfig, TrainConfig, default_base_dir
from megacontext.model.gpt import GPT
from megacontext.train import schedule
from megacontext.train.optim import build_optimizer
from megacontext.train.setup import compiled


class HarnessModel(nn.Module):
    """A GPT with nanochat's call: model(x) is logits, model(x, y) the mean loss, or losses [B·T] with "none"."""

    def __init__(self, gpt: GPT, forward: GPT) -> None:
        super().__init__()
        self.gpt = gpt
        self._runs = [forward]  # in a list: the compiled twin shares its weights and must not be registered again

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, loss_reduction: str = "mean") -> torch.Tensor:
        if y is None:
            return self._runs[0](x)  # type: ignore[no-any-return]
        return self._runs[0].loss(x, y, reduction=loss_reduction)


class Adapter:
    """What the harness asks of an implementation."""

    name = "megacontext"

    def build(self, config: SimpleNamespace) -> HarnessModel:
        """A model of the harness's shape, seeded, in the dtype and compilation of the environment."""
        precision.keep_freed_memory()
        device = torch.device("cpu")
        gpt = GPT(
            GPTConfig(sequence_len=config.seq, vocab_size=config.vocab, n_layer=config.depth, n_head=config.heads,
                      n_kv_head=config.heads, n_embd=config.dim)
        )  # fmt: skip
        gpt.init_weights(torch.Generator().manual_seed(42))
        if os.environ.get("MC_BENCH_DTYPE") == "auto":
            gpt.compute_dtype = precision.choose_dtype("auto", device)
        else:
            gpt.compute_dtype = getattr(torch, os.environ.get("NANOCHAT_DTYPE", "float32"))
        return HarnessModel(gpt, compiled(gpt, os.environ.get("MC_BENCH_COMPILE", "auto"), device))

    def stepper(self, model: HarnessModel, num_iterations: int, total_batch: int) -> Callable[[int], None]:
        """A function of the step that clips, updates at the scheduled rates, and drops the gradients."""
        optimizer = build_optimizer(model.gpt, TrainConfig())

        def step(it: int) -> None:
            optimizer.reduce(1)
            optimizer.clip(1.0)
            optimizer.step(schedule.lr_multiplier(it, num_iterations), schedule.muon_momentum(it))
            optimizer.zero_grad()

        return step

    def generator(self, model: HarnessModel, prompt: Sequence[int], n: int, max_tokens: int) -> Iterator[Any]:
        """Decode with the engine, one token per row and `next()`, at temperature 1 and top-k 50."""
        from megacontext.inference.engine import Engine

        model.gpt.prepare_inference()
        engine = Engine(model.gpt, _NoStop(model.gpt.config.vocab_size))  # type: ignore[arg-type]
        return engine.generate(list(prompt), num_samples=n, max_tokens=max_tokens, temperature=1.0, top_k=50)

    def loader(self, rows: int, seq_len: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokenize and pack the harness's training documents as they come, for ever; (inputs, targets) [rows, T]."""
        from megacontext.data.packing import pack_rows
        from megacontext.data.parquet import list_parquet, read_texts, split_parquet
        from megacontext.data.tokenizer import Tokenizer

        base = default_base_dir()
        tokenizer = Tokenizer.load(os.path.join(base, "tokenizer"))
        shards, _ = split_parquet(list_parquet(os.path.join(base, "base_data")))
        texts = (texts for shard in itertools.cycle(shards) for texts in read_texts(shard))
        documents = (tokenizer.encode_numpy(text) for group in texts for text in group)
        for block in pack_rows(documents, seq_len + 1, tokenizer.bos_id, block_rows=rows):
            ids = torch.from_numpy(block.astype(np.int64))
            yield ids[:, :-1], ids[:, 1:]


class _NoStop:
    """A tokenizer whose special ids never occur, so no row ends early."""

    bos_id = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def special(self, name: str) -> int:
        return -2 - zlib.crc32(name.encode())

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return ""
