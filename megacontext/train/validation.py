"""How a stage is judged while it trains: validation bits per byte on token shards, the rows divided among the workers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from megacontext.data.shards import ShardSet
from megacontext.data.tokenizer import Tokenizer
from megacontext.eval.bpb import BpbResult, evaluate_bpb, shard_batches, validation_rows
from megacontext.model.gpt import GPT
from megacontext.train.rows import open_shards

if TYPE_CHECKING:
    from megacontext.train.task import TrainTask


class Judge(Protocol):
    """Judges a model; the same on every rank."""

    def __call__(self, model: GPT, rank: int, world_size: int) -> Mapping[str, float]:
        """Figures by name, logged as `val/<name>`. The first decides which checkpoint is the best: lower is better."""

    def seconds(self, model: GPT, world_size: int) -> float:
        """About how long one worker takes to judge a model."""


@dataclass(frozen=True)
class BpbJudge:
    """Bits per byte and loss in nats on the first `max_tokens` targets of shards (all of them if fewer)."""

    shards: ShardSet
    tokenizer: Tokenizer
    max_tokens: int
    batch_rows: int

    @classmethod
    def open(cls, task: TrainTask, tokenizer: Tokenizer, verify: bool) -> BpbJudge:
        """The judge of a task's validation shards. Raises DataError when they do not fit the task."""
        shards = open_shards(task, task.val_tokens_dir, tokenizer, verify)
        return cls(shards, tokenizer, task.train.eval_tokens, task.train.device_batch_size)

    def __call__(self, model: GPT, rank: int, world_size: int) -> Mapping[str, float]:
        result = self.result(model, rank, world_size)
        return {"bpb": result.bpb, "loss": result.loss}

    def result(self, model: GPT, rank: int = 0, world_size: int = 1) -> BpbResult:
        """Bits per byte with its counts. Every rank must call it."""
        rows = validation_rows(self.shards, self.max_tokens)[rank::world_size]
        token_bytes = self.tokenizer.token_bytes().to(model.device)
        return evaluate_bpb(model, shard_batches(self.shards, rows, self.batch_rows, model.device), token_bytes)

    @torch.no_grad()
    def seconds(self, model: GPT, world_size: int) -> float:
        """Seconds of one worker's share of a validation, by its first micro-batch."""
        rows = validation_rows(self.shards, self.max_tokens)[::world_size]
        before = time.perf_counter()
        for ids, targets in shard_batches(self.shards, rows[: self.batch_rows], self.batch_rows, model.device):
            float(model.loss(ids, targets, reduction="none").sum())  # the number waits for the device
        return (time.perf_counter() - before) * len(rows) / min(self.batch_rows, len(rows))
