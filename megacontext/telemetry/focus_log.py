"""What a session's refocuses did: events to the collector while it runs, and the timeline as a picture afterwards.

log = FocusLog(otel.from_environment(run="chat"))
session = mc.Session(model, tokenizer, budget=512, on_refocus=log)
...
log.update(session.stats.metrics())
print(log.text())
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from megacontext.telemetry import otel, timeline
from megacontext.telemetry.otel import FocusNumbers, Telemetry

KEEP_FRAMES = 512


class Snapshot(timeline.Tiling, otel.Tiling, Protocol):
    """A working context, as both the timeline and the events see it."""


class FocusLog:
    """Call it after every refocus with its report and the context that it left.

    Keeps at most `keep` frames: when there are more, every other one goes, so the whole history stays in the picture
    and memory does not grow with it.
    """

    def __init__(self, telemetry: Telemetry | None = None, keep: int = KEEP_FRAMES) -> None:
        self.telemetry = telemetry or Telemetry()
        self.frames: list[timeline.Frame] = []
        self.budget: int | None = None
        self._last: timeline.Frame | None = None
        self._keep, self._every, self._seen = max(2, keep), 1, 0

    def __call__(self, report: FocusNumbers, context: Snapshot) -> None:
        self._last = (report.refocus, context)
        if self._seen % self._every == 0:
            self.frames.append(self._last)
        self._seen += 1
        self.budget = report.budget
        if len(self.frames) > self._keep:
            self.frames, self._every = self.frames[::2], 2 * self._every
        if self.telemetry.enabled:
            self.telemetry.event("focus_allocator", **otel.focus_values(report))
            self.telemetry.event("working_context_snapshot", **otel.context_values(context))

    def update(self, metrics: Mapping[str, float]) -> None:
        """Send an `inference_update`: `runtime/…` metrics by their names without the prefix."""
        values = {name.removeprefix("runtime/"): value for name, value in metrics.items()}
        self.telemetry.event("inference_update", **values)

    def text(self, width: int = 96, rows: int = 24) -> str:
        """The timeline for a terminal; a line that says so when nothing was refocused."""
        return timeline.timeline_text(self._shown(), width, rows) if self._seen else "no refocus yet"

    def png(self, title: str) -> bytes | None:
        """The timeline as PNG bytes; None when nothing was refocused."""
        return timeline.timeline_png(self._shown(), title, self.budget) if self._seen else None

    def _shown(self) -> list[timeline.Frame]:
        """The frames kept, and always the last one."""
        tail = [] if self._last is None or self.frames[-1] is self._last else [self._last]
        return [*self.frames, *tail]
