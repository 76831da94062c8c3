"""Validation bits per byte of a model on token shards, its rows divided among the workers."""

from __future__ import annotations

from megacontext.data.shards import ShardSet
from megacontext.data.tokenizer import Tokenizer
from megacontext.eval.bpb import BpbResult, evaluate_bpb, shard_batches, validation_rows
from megacontext.model.gpt import GPT
from megacontext.train.worker import Worker


def validate(
    model: GPT, shards: ShardSet, tokenizer: Tokenizer, worker: Worker, max_tokens: int, batch_rows: int
) -> BpbResult:
    """Bits per byte on the first `max_tokens` targets of the shards (all of them if fewer). Every rank must call it."""
    rows = validation_rows(shards, max_tokens)[worker.rank :: worker.world_size]
    token_bytes = tokenizer.token_bytes().to(worker.device)
    return evaluate_bpb(model, shard_batches(shards, rows, batch_rows, worker.device), token_bytes)
