"""The feed-forward half of a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megacontext.config import GPTConfig
from megacontext.model.attention import Linear


class _ReluSquared(torch.autograd.Function):
    """relu(x)²; its slope, 2·relu(x), is zero where relu is, so relu(x) is all the backward needs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        positive = x.clamp(min=0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (positive,) = ctx.saved_tensors
        slope: torch.Tensor = 2 * positive
        return slope.mul_(grads[0])


class MLP(nn.Module):
    """D to 4·D, relu², and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = _ReluSquared.apply(self.c_fc(x))  # type: ignore[no-untyped-call]
        return self.c_proj(hidden)  # type: ignore[no-any-return]
