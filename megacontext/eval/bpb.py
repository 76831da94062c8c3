"""Bits per byte: a loss that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megacontext.errors import DataError

if TYPE_CHECKING:
    from megacontext.data.shards import ShardSet
    from megacontext.model.gpt import GPT


@dataclass(frozen=True)
class BpbResult:
    """Plain sums, so that results of parts of the data add up, and the two ratios people read."""

    nats: float  # total cross-entropy of the targets that have bytes
    bytes: int  # total UTF-8 bytes of those targets
    tokens: int  # how many they are

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return self.nats / (math.log(2) * self.bytes) if self.bytes else math.nan

    def __add__(self, other: BpbResult) -> BpbResult:
        return BpbResult(self.nats + other.nats, self.bytes + other.bytes, self.tokens + other.tokens)


@torch.no_grad()
def evaluate_bpb(
    model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], token_bytes: torch.Tensor
) -> BpbResult:
    """Bits per byte of a model over batches of (ids [B, T], targets [B, T] with -1 ignored), as nanochat defines it.

    Targets without bytes (special tokens; token_bytes [V] is 0 there) count neither as nats nor as bytes. Sums are kept
    on the device of token_bytes, so nothing waits for a GPU before the end. When torch.distributed runs, every rank
    must call this, each with its own batches (none is allowed), and every rank gets the sum.

    Raises DataError when no batch was given to any rank.
    """
    device = token_bytes.device
    token_bytes = token_bytes.to(torch.int64)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # bytes, tokens, batches
    for ids, targets in batches:
        losses = model.loss(ids, targets, reduction="none").reshape(targets.shape)  # [B, T]
        sizes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)  # [B, T] bytes
        counted = sizes > 0
        nats += torch.where(counted, losses, 0).sum(dtype=torch.float64)
        counts += torch.stack([sizes.sum(), counted.sum(), counts.new_ones(())])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(nats)
        dist.all_reduce(counts)
    total_bytes, tokens, num_batches = counts.tolist()
    if not num_batches:
        raise DataError("bits per byte of no batches; give at least one row of validation tokens.")
    return BpbResult(nats.item(), total_bytes, tokens)


def validation_rows(shards: ShardSet, max_tokens: int) -> np.ndarray:
    """Which rows a validation of at most `max_tokens` targets reads: the first ones, at least one; -1 is all."""
    rows = shards.num_rows if max_tokens < 0 else max(1, max_tokens // (shards.row_tokens - 1))
    return np.arange(min(rows, shards.num_rows), dtype=np.int64)


def split_row(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Columns of shard rows -> (ids [B, T] int64, targets [B, T] int64, -1 where the mask column says no)."""
    ids = columns["ids"].astype(np.int64)
    targets = ids[:, 1:].copy()
    if "mask" in columns:
        targets[columns["mask"][:, 1:] == 0] = -1
    return ids[:, :-1], targets


def shard_batches(
    shards: ShardSet, rows: np.ndarray, batch_rows: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (ids, targets), each [<= batch_rows, T] int64, over the given rows."""
    for start in range(0, len(rows), batch_rows):
        ids, targets = split_row(shards.read(rows[start : start + batch_rows]))
        yield torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device)
