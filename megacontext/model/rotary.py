"""Rotary positions (Su et al., 2021, arXiv:2104.09864) in the half-split pairing: channel c turns with channel c + K/2.

y1 = x1·cos + x2·sin, y2 = −x1·sin + x2·cos. Tables are bfloat16, as in nanochat: parity needs the same rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megacontext.model.norm import inverse_rms, norm_backward, rms_norm, wide

BASE = 10_000.0


class Rotary(NamedTuple):
    """Positions of entries as attention uses them: cos and sin, each [B, L, 1, K/2] (B or 1 rows), and `bias` [B, L],
    what is added to the logits of an entry as a key, times the slope of each head; None where nothing is.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    bias: torch.Tensor | None = None

    def to(self, target: torch.device | torch.dtype) -> Rotary:
        """On another device, or with cos and sin in another dtype."""
        if isinstance(target, torch.dtype):
            return Rotary(self.cos.to(target), self.sin.to(target), self.bias)
        moved = [None if part is None else part.to(target, non_blocking=True) for part in self]
        return Rotary(*moved)  # type: ignore[arg-type]

    def span(self, start: int, stop: int) -> Rotary:
        """Of the entries [start, stop)."""
        bias = None if self.bias is None else self.bias[:, start:stop]
        return Rotary(self.cos[:, start:stop], self.sin[:, start:stop], bias)

    def then(self, later: Rotary) -> Rotary:
        """Of these entries and `later` ones."""
        bias = None if self.bias is None or later.bias is None else torch.cat([self.bias, later.bias], 1)
        return Rotary(torch.cat([self.cos, later.cos], 1), torch.cat([self.sin, later.sin], 1), bias)


def rotary_angles(positions: torch.Tensor, head_dim: int, base: float = BASE) -> torch.Tensor:
    """Angles [T, K/2] in radians of float positions [T]; channel pair c turns at base^(−2c/K) per token."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    return torch.outer(positions.float(), 1.0 / (base ** (channels / head_dim)))


class RotaryTable:
    """cos and sin of the positions 0, 1, 2, …, computed once per device and grown on demand. No part of a state dict."""

    def __init__(self, head_dim: int, base: float = BASE) -> None:
        self.head_dim, self.base = head_dim, base
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def slice(self, start: int, tokens: int, device: torch.device) -> Rotary:
        """cos and sin of positions [start, start + tokens), each [1, tokens, 1, K/2] bfloat16."""
        table = self._tables.get(device)
        if table is None or table[0].shape[1] < start + tokens:
            length = max(1024, 1 << (start + tokens - 1).bit_length())
            # A table made under inference mode could not be saved for a later backward.
            with torch.inference_mode(False):
                angles = rotary_angles(
                    torch.arange(length, dtype=torch.float32, device=device), self.head_dim, self.base
                )
                table = (angles.cos().bfloat16()[None, :, None, :], angles.sin().bfloat16()[None, :, None, :])
            self._tables[device] = table
        cos, sin = table
        return Rotary(cos[:, start : start + tokens], sin[:, start : start + tokens])


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, K] turned by the angles of cos and sin, in the dtype of all three."""
    x1, x2 = x.chunk(2, dim=-1)
    y = torch.empty_like(x)
    y1, y2 = y.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=-1)
    return y


class _RotateNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        dtype = wide(x.dtype)  # one cast in and one out; in between nothing is rounded
        cos, sin = cos.to(dtype), sin.to(dtype)
        turned = _rotated(x.to(dtype), cos, sin)
        scale = inverse_rms(turned)
        y = turned.mul_(scale).to(x.dtype)
        ctx.save_for_backward(y, scale, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        y, scale, cos, sin = ctx.saved_tensors
        turned = norm_backward(grads[0], y, scale)
        return _rotated(turned, cos, -sin).to(y.dtype), None, None


def rotate_and_norm(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate queries or keys x [B, T, H, K], then RMS-norm each head ("QK norm"). Uncompiled it is one
    autograd node with one saved copy."""
    if torch.compiler.is_compiling():  # a compiler fuses the plain formula, and cannot trace the other in every case
        dtype = wide(x.dtype)
        cos, sin, (x1, x2) = rotary.cos.to(dtype), rotary.sin.to(dtype), x.to(dtype).chunk(2, dim=-1)
        return rms_norm(torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], -1), x.dtype)
    return _RotateNorm.apply(x, rotary.cos, rotary.sin)  # type: ignore[no-any-return, no-untyped-call]
