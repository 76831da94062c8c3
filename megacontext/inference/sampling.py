"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megacontext import arguments


def row_generators(seed: int, rows: int) -> list[torch.Generator]:
    """One random stream per row, on the CPU. Stream i depends on (seed, i) alone, not on how many rows there are.

    Raises UserError for a seed that cannot be (`check_seed`).
    """
    seed = check_seed(seed)
    return [torch.Generator().manual_seed(_mix(seed, row)) for row in range(rows)]


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> torch.Tensor:
    """Draw one id per row: logits [B, V] float32 -> ids [B] int64, on the device of the logits.

    Temperature 0 is greedy (the first of equal maxima) and draws nothing. Otherwise each row draws one uniform number
    and inverts its own cumulative distribution. With one generator per row (`row_generators`) a row's ids therefore
    do not depend on its neighbours; with a single CPU generator, rows share a stream; None uses torch's global one.

    Raises UserError for a negative or non-finite temperature or a top_k below 1, NonFiniteError for logits without a
    finite maximum. A logit of minus infinity is an id that is never drawn.
    """
    check_sampling(temperature, top_k)
    best = logits.max(dim=-1)
    arguments.finite("the largest logit", best.values)  # NaN anywhere makes the maximum NaN
    if temperature == 0.0:
        return best.indices
    ids = None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k, dim=-1)
    # Subtract the maximum before dividing: a tiny temperature must not overflow to inf - inf.
    scaled = (logits.double() - best.values.double()[:, None]) / temperature
    cumulative = scaled.exp().cumsum(dim=-1)  # [B, K]; unnormalised, in float64 so that a vocabulary of tails adds up
    draws = _uniform(logits.size(0), generator).to(logits.device)
    choice = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    choice = choice.clamp_(max=logits.size(-1) - 1)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


def check_sampling(temperature: float, top_k: int | None) -> None:
    """Raise UserError unless the settings are ones that `sample` can use."""
    arguments.number("temperature", temperature, 0, remedy="0 is greedy.")
    if top_k is not None:
        arguments.whole_number("top_k", top_k, 1, remedy="None samples from the whole vocabulary.")


def check_seed(seed: int) -> int:
    """The seed. Raises UserError for anything but a whole number from 0 to 2^64 - 1."""
    return arguments.whole_number("seed", seed, 0, arguments.MAX_SEED)


def _uniform(rows: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 [rows], on the CPU."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(rows, dtype=torch.float64, generator=generator)
    assert len(generator) == rows, f"{len(generator)} generators for {rows} rows"
    return torch.cat([torch.rand(1, dtype=torch.float64, generator=stream) for stream in generator])


def _mix(seed: int, row: int) -> int:
    """A 64-bit hash of (seed, row): the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (row + 1) * 0xD1B54A32D192ED03) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & mask
