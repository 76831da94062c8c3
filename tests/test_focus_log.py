"""The log of a session's refocuses: bounded, complete at both ends, and sent as events."""

from __future__ import annotations

from typing import Any

import numpy as np
from allocators import allocator_config

from megacontext.context.allocator import FocusAllocator
from megacontext.context.working_context import WorkingContext
from megacontext.telemetry.focus_log import FocusLog
from megacontext.telemetry.otel import Telemetry


class Recorder(Telemetry):
    """Telemetry that is on, and keeps its events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, dict[str, Any]]] = []

    @property
    def enabled(self) -> bool:
        return True

    def event(self, name: str, **values: Any) -> None:
        self.events.append((name, values))


def run(log: FocusLog, refocuses: int) -> None:
    allocator = FocusAllocator(allocator_config(budget=96, recent_tokens=16))
    context = WorkingContext.initial(200, 32, 96, 16)
    for _ in range(refocuses):
        context, report = allocator.refocus(context, lambda c: np.zeros(len(c)), headroom=8)
        log(report, context)
        context = allocator.extend(context, 8)


def test_frames_are_bounded_and_keep_first_and_last() -> None:
    log = FocusLog(keep=10)
    run(log, 100)
    shown = [refocus for refocus, _ in log._shown()]
    assert 5 <= len(shown) <= 11
    assert shown[0] == 0
    assert shown[-1] == 99
    steps = np.diff(shown[:-1])
    assert (steps == steps[0]).all()
    assert log.text(40, 8).split("\n")[-2].split()[0] == "99"
    png = log.png("a session")
    assert png is not None
    assert png[:4] == b"\x89PNG"


def test_every_refocus_is_an_event_with_its_numbers() -> None:
    recorder = Recorder()
    log = FocusLog(recorder)
    run(log, 3)
    log.update({"runtime/latency_ms": 2.5, "runtime/swap_rate": 0.1})
    assert [name for name, _ in recorder.events] == [
        *["focus_allocator", "working_context_snapshot"] * 3, "inference_update",
    ]  # fmt: skip
    assert [values["refocus"] for name, values in recorder.events if name == "focus_allocator"] == [0, 1, 2]
    assert recorder.events[-1][1] == {"latency_ms": 2.5, "swap_rate": 0.1}


def test_nothing_to_show() -> None:
    log = FocusLog()
    assert log.text() == "no refocus yet"
    assert log.png("x") is None
