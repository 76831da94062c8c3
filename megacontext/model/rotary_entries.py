"""Rotary positions of a working context's entries, which may each cover many tokens.

slot: an entry turns by its number in the context, so nothing ever lies beyond the training length.
simple: by the mean position of what it covers. gaussian: by the expectation of the rotation over what it covers, so
bands that turn several times within an entry fade (Gaussian approximation: exp(-(ω·σ)²/2)).
gaussian_alibi: the same, and an entry is attended to less the more text gists hide between it and the end.
True positions beyond the training length are compressed to its logarithm, so that they stay near those seen.
Of raw entries within that length all of them are the vanilla rotary, bit for bit.
"""

from __future__ import annotations

import math

import torch

from megacontext.model.rotary import BASE, Rotary

EXACT = 1 << 16  # float32 products of positions below are what the vanilla table holds


def entry_rotary(
    kind: str,
    positions: torch.Tensor,
    sigmas: torch.Tensor,
    slots: torch.Tensor,
    head_dim: int,
    train_length: int,
    end: torch.Tensor | None = None,
) -> Rotary:
    """cos and sin, each [B, L, 1, K/2] bfloat16, of entries; of gaussian_alibi with a bias [B, L] float32.

    positions, sigmas: float64 [B, L] tokens; slots: int64 [B, L]. `end` [B] is the token count from which distances are
    measured (the history's length unless given); a decoder keeps it fixed while it keeps its cache.
    """
    if kind == "slot":
        angles = _angles(slots.double(), head_dim)
        return Rotary(*_tables(angles, None))
    if end is None:
        end = positions[:, -1].floor() + 1
    angles = _angles(_near(positions, end[:, None].double(), train_length), head_dim)
    if kind == "simple":
        return Rotary(*_tables(angles, None))
    rates = _rates(head_dim, positions.device, torch.float64)
    damping = torch.exp(-0.5 * (sigmas.double()[..., None] * rates) ** 2).float()
    bias = -torch.log2(1 + hidden_tokens(positions, slots)).float() if kind == "gaussian_alibi" else None
    return Rotary(*_tables(angles, damping), bias)


def hidden_tokens(positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """How many tokens between each entry and the end of its context no entry shows, float64 [B, L]: 0 if all are raw.

    ALiBi (Press et al., 2022, arXiv:2108.12409) lowers a logit by distance. Distance in entries is the rotary's part
    here; what is left is what gists hide, by its logarithm, since a history may be a million times as long as a block.
    It is the same for every query, so a bias of the keys is enough; padding behind the last entry changes nothing.
    """
    ahead = positions.double() - slots
    return ahead.amax(-1, keepdim=True) - ahead


def _near(positions: torch.Tensor, end: torch.Tensor, train_length: int) -> torch.Tensor:
    """Positions whose distance from the end grows with its logarithm beyond `train_length`; exact where nothing is far."""
    distance = end - positions

    def compress(x: torch.Tensor) -> torch.Tensor:
        far = train_length * (1 + torch.log(x.clamp(min=train_length) / train_length))
        return torch.where(x > train_length, far, x)

    return torch.where(end > train_length, compress(end).round() - compress(distance), positions)


def _rates(head_dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    return (1.0 / (BASE ** (channels / head_dim))).to(dtype)


def _angles(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Angles [B, L, K/2] float32; far positions by float64, whose product is exact enough at any distance."""
    near = positions.float()[..., None] * _rates(head_dim, positions.device, torch.float32)
    if positions.numel() == 0 or float(positions.max()) < EXACT:
        return near
    far = torch.remainder(positions[..., None] * _rates(head_dim, positions.device, torch.float64), 2 * math.pi)
    return torch.where(positions[..., None] < EXACT, near, far.float())


def _tables(angles: torch.Tensor, damping: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = angles.cos(), angles.sin()
    if damping is not None:
        cos, sin = cos * damping, sin * damping
    return cos.bfloat16()[:, :, None, :], sin.bfloat16()[:, :, None, :]
