"""The device batch of an `--mc` run: as many rows as asked for, or half of them again and again, until they fit the free memory.

What a row takes is counted, not guessed: all tensors that one forward pass of it keeps for the backward pass. The peak of
a whole step was 1.0 to 1.6 times that per row (jobs/records/2026-11-27_cpu_tier.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

PEAK = 2.0  # peak of a step per row, as a multiple of what the forward pass of a row of text keeps, with a reserve
USABLE = 0.8  # share of the free memory that training may take
STATE_BYTES = 12  # of a parameter, beside its weight: gradient and two moments in float32

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def fitting_batch(device_batch: int, row_bytes: int, fixed_bytes: int, free_bytes: int) -> int:
    """The largest device_batch / 2^k whose rows fit beside `fixed_bytes`; 1 when nothing else fits, or the half is not whole."""
    room = USABLE * free_bytes - fixed_bytes
    fitting = device_batch
    while fitting > 1 and fitting * PEAK * row_bytes > room:
        fitting = fitting // 2 if fitting % 2 == 0 else 1
    return fitting


def saved_bytes(model: torch.nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights left out. Independent of the load and of other processes."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; holding the tensor keeps its address from being used again

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take: of the GPU, or of the machine and of the container it runs in."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_machine(), *_containers()])


def _machine() -> int:
    """Free memory by the kernel's own estimate; half of the memory where there is none (not Linux)."""
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _containers() -> list[int]:
    """What the memory limits of the control groups around this process leave (versions 2 and 1)."""
    try:
        groups = [line.split(":", 2) for line in (_PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, path in groups:
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root, names = (_CGROUP, ("memory.max", "memory.current", "inactive_file"))
        if controllers:
            root, names = (
                _CGROUP / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        inside = Path(path.lstrip("/"))
        left += [_left(root / folder, *names) for folder in (inside, *inside.parents)]
    return [value for value in left if value is not None]


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Limit less usage of one control group, files that the kernel may drop not counted; None without a limit."""
    try:
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int((folder / limit).read_text()) - used + int(stat.get(reclaimable, 0)))
    except (OSError, ValueError):  # not mounted here, or "max"
        return None
