"""What one micro-batch needs in a step: drawn on the CPU ahead of use, then moved to the device in one transfer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megacontext.data.stream import Batch
from megacontext.train.memory_plan import MemoryPlan

_ALIGNMENT = 16  # bytes: a multiple of the size of every dtype
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class StepPlan:
    """B rows of T tokens: `inputs`, `targets` int64 [B, T], -1 where a target does not count.

    `weights` float32 [B, T]: factors of the targets' losses; None: all are 1. `rows` [B]: numbers of the rows in the
    shards. `targets_counted`: how many targets count. `memory`: what a model with a memory needs beside the rows.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None
    rows: npt.NDArray[np.int64]
    targets_counted: int
    memory: MemoryPlan | None = None

    @classmethod
    def of(cls, batch: Batch, memory: MemoryPlan | None = None) -> StepPlan:
        """The plan of a micro-batch, on the CPU."""
        targets = batch.targets
        counted = targets.numel() if batch.weights is None else int((targets >= 0).sum())
        return cls(batch.inputs, targets, batch.weights, batch.rows, counted, memory)

    def to(self, device: torch.device) -> StepPlan:
        """The plan on a device."""
        return self if device.type == "cpu" else in_one_transfer(self, device)


def in_one_transfer(value: _Value, device: torch.device) -> _Value:
    """A dataclass of tensors, of such dataclasses and of tuples of tensors, with all of its tensors on a device.

    The bytes of all tensors are copied into one buffer, pinned where the device is a GPU, and the buffer is moved once.
    """
    tensors = list(_tensors(value))
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    starts = np.cumsum([0, *padded]).tolist()
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, start, size in zip(tensors, starts, sizes, strict=False):
        buffer[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    moved = buffer.to(device, non_blocking=True)
    parts = [
        moved[start : start + size].view(tensor.dtype).view(tensor.shape)
        for tensor, start, size in zip(tensors, starts, sizes, strict=False)
    ]
    result: _Value = _with(value, iter(parts))
    return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested value, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for item in fields(value):
            yield from _tensors(getattr(value, item.name))


def _with(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The nested value with other tensors, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        parts = [_with(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: _with(getattr(value, item.name), tensors) for item in fields(value)})
    return value
