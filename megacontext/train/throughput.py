"""How fast a step is: the time of its phases, tokens per second, model FLOPs utilization, peak memory."""

from __future__ import annotations

import resource
import sys
import time

import torch


class Stopwatch:
    """Times the phases of one step. On a GPU it records events, so marking does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def start(self) -> None:
        """Begin a step."""
        self._marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        """End a phase; phases of the same name add up. The phase `forward/raw` is part of the phase `forward`."""
        self._marks.append((phase, self._now()))

    def phases_ms(self) -> dict[str, float]:
        """Milliseconds of each phase of the step, and of each part of one. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            spent, whole = _elapsed_ms(begin, end), phase.partition("/")[0]
            for name in dict.fromkeys((whole, phase)):
                totals[name] = totals.get(name, 0.0) + spent
        return totals

    def _now(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _elapsed_ms(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return (end - begin) * 1e3
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return float(begin.elapsed_time(end))


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held so far: of the GPU, or the resident size of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
