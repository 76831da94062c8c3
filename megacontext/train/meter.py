"""Means of a step by name, kept on the device and summed over workers together, so that nothing waits for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Meter:
    """Weighted sums of fixed names. `totals` of several workers add up; `means` reads them."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self._slot = {name: slot for slot, name in enumerate(self.names)}
        self._zero = torch.zeros((), device=device)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        slots = 2 * len(self.names)
        self._numbers = [0.0] * slots
        self._tensors = [self._zero] * slots

    def add(self, name: str, total: Tensor | float, weight: Tensor | float) -> None:
        """Add a sum of values and the sum of their weights; tensors are scalars and are taken without their gradient."""
        for slot, value in ((self._slot[name], total), (self._slot[name] + len(self.names), weight)):
            if isinstance(value, Tensor):
                self._tensors[slot] = self._tensors[slot] + value.detach().float()
            else:
                self._numbers[slot] += value

    def totals(self) -> Tensor:
        """[2·names] float32: all sums, then all weights, since the last reset."""
        return torch.stack(self._tensors) + torch.tensor(self._numbers).to(self._zero.device, non_blocking=True)

    def means(self, totals: Sequence[float]) -> dict[str, float]:
        """Means by name; names without weight are left out."""
        count = len(self.names)
        pairs = zip(self.names, totals[:count], totals[count:], strict=True)
        return {name: total / weight for name, total, weight in pairs if weight}
