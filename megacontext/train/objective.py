"""What is minimized: next-token cross-entropy over the ids of a row that count as targets."""

from __future__ import annotations

import torch

from megacontext.data.stream import Batch
from megacontext.model.gpt import GPT


def count_targets(batch: Batch) -> int:
    """How many ids of a batch are targets."""
    if batch.mask is None:
        return batch.inputs.numel()
    return int(batch.mask[:, 1:].sum())


def next_token_loss(model: GPT, batch: Batch, device: torch.device, scale: float) -> torch.Tensor:
    """Sum of the cross-entropy over a batch's targets in nats, times `scale`. A batch without targets gives 0."""
    inputs, targets = batch.inputs.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True)
    return model.loss(inputs, targets, reduction="sum") * scale
