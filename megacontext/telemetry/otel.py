"""Spans, events and metrics over OTLP, where the environment names a collector; nothing at all otherwise.

A collector that is slow, broken or absent never stops or slows a run: spans wait in a bounded queue, a thread sends
them with short timeouts, what does not fit is dropped, and closing waits a few seconds at most. Attributes are named
`mc.<key>`, events are those in `EVENTS`. `otlp.py` reads the variables.

    with otel.opened(run="mine", rank=0):            # one place of a process: a job, a training process, a server
        with otel.span("train_step", step=7) as step:    # everywhere below it
            with otel.span("session_refocus") as refocus:
                refocus.event("focus_allocator", **focus_values(report))
            step.set(loss=2.5)
"""

from __future__ import annotations

import atexit
import math
import os
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import numpy as np

from megacontext.errors import UserError
from megacontext.telemetry import otlp
from megacontext.telemetry.otlp import Destination, Reporting
from megacontext.telemetry.provenance import redact

EVENTS = frozenset(
    ("mc_tree_snapshot", "working_context_snapshot", "focus_allocator", "mc_timing", "delta_nll", "mc_batch_stats", "inference_update")
)  # fmt: skip
CLOSE_SECONDS = 3.0  # for everything that still waits
Item = TypeVar("Item")
PARENT = "TRACEPARENT"  # W3C trace context: the span of another process that this process works for

_current: ContextVar[Span | None] = ContextVar("mc_otel_span", default=None)


class Span:
    """A piece of work with a start and an end. Ending twice is fine; after the end, events are ignored."""

    def __init__(self, span: Any) -> None:
        self._span = span  # None when telemetry is off

    def event(self, name: str, **values: Any) -> None:
        """A moment within this span: one of `EVENTS`, with attributes `mc.<key>`."""
        assert name in EVENTS, f"{name} is not an event of SPEC §7"
        if self._span is not None:
            self._span.add_event(name, attributes(values))

    def set(self, **values: Any) -> None:
        """Add attributes `mc.<key>`."""
        if self._span is not None:
            self._span.set_attributes(attributes(values))

    def fail(self, error: BaseException) -> None:
        """Mark as failed by the kind of error; its text may quote a user's words and is not sent."""
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, type(error).__name__))

    def end(self) -> None:
        if self._span is not None:
            self._span.end()

    @contextmanager
    def here(self) -> Iterator[Span]:
        """Make this the span that the thread is in, for a block of code. An exception marks it; it does not end."""
        if self._span is None:
            yield self
            return
        token = _current.set(self)
        try:
            yield self
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            _current.reset(token)


class Telemetry:
    """Where spans, events and metrics go. Without a destination every call does nothing, and OpenTelemetry is not imported."""

    def __init__(self, traces: Destination | None = None, metrics: Destination | None = None, **resource: Any) -> None:
        """`resource`: who sends (`run`, `rank`), as attributes `mc.<key>` of everything sent.

        Raises UserError when `MC_OTEL_ENDPOINT` is set and OpenTelemetry is not installed. Without the packages the
        standard variables do nothing but print a line.
        """
        self._providers: list[Any] = []
        self._exporters: list[Reporting] = []
        self._tracer: Any = None
        self._meter: Any = None
        self._gauges: dict[str, Any] = {}
        try:
            sender = otlp.sender(attributes(resource)) if traces or metrics else None
            if traces is not None:
                self._tracer = self._add(otlp.tracer_provider(traces, sender)).get_tracer("megacontext")
            if metrics is not None:
                self._meter = self._add(otlp.meter_provider(metrics, sender)).get_meter("megacontext")
        except ImportError as error:
            missing = f"OpenTelemetry is not installed ({error}); pip install 'megacontext[otel]'"
            if traces is not None and traces.demanded:
                raise UserError(f"{otlp.ENDPOINT} is set, but {missing}, or unset it.") from error
            otlp.say(f"nothing is sent: {missing}")
        if self._providers:
            atexit.register(self.close)

    def _add(self, made: tuple[Any, list[Reporting]]) -> Any:
        provider, exporters = made
        self._providers.append(provider)
        self._exporters += exporters
        return provider

    @property
    def enabled(self) -> bool:
        """Whether spans and events are sent; ask before computing what only an event needs."""
        return self._tracer is not None

    @contextmanager
    def span(self, name: str, parent: Span | None = None, **values: Any) -> Iterator[Span]:
        """A span around a block of code, below `parent` or the span that this thread is in; an exception marks it."""
        span = self.start(name, parent, **values)
        try:
            with span.here():
                yield span
        finally:
            span.end()

    def start(self, name: str, parent: Span | None = None, **values: Any) -> Span:
        """A span that the caller ends, for work that outlives a function: a request, a generator, another thread.

        It is nobody's current span; give it as `parent` to those within it.
        """
        if self._tracer is None:
            return _OFF
        from opentelemetry.trace import INVALID_SPAN, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        above = parent or _current.get()
        context = set_span_in_context(INVALID_SPAN if above is None or above._span is None else above._span)
        if above is None and os.environ.get(PARENT):
            context = TraceContextTextMapPropagator().extract({"traceparent": os.environ[PARENT]}, context)
        return Span(self._tracer.start_span(name, context=context, attributes=attributes(values)))

    def event(self, name: str, **values: Any) -> None:
        """An event of the span that this thread is in; outside of any it gets a span of its own."""
        if self._tracer is None:
            return
        current = _current.get()
        if current is not None:
            current.event(name, **values)
            return
        with self.span(name) as span:
            span.event(name, **values)

    def gauges(self, values: Mapping[str, float]) -> None:
        """Set metrics, by the names of SPEC §6. Numbers that are not finite are left out."""
        if self._meter is None:
            return
        for name, value in values.items():
            if math.isfinite(value):
                if name not in self._gauges:
                    self._gauges[name] = self._meter.create_gauge(name)
                self._gauges[name].set(value)

    def close(self) -> None:
        """Send what waits, for `CLOSE_SECONDS` at most, and stop. Closing twice is fine."""
        providers, self._providers = self._providers, []
        self._tracer = self._meter = None
        if not providers:
            return
        atexit.unregister(self.close)

        def shut_down() -> None:
            for provider in providers:
                provider.shutdown()

        # A provider's own shutdown waits up to 30 s for a collector that hangs.
        stopping = threading.Thread(target=shut_down, name="otel-close", daemon=True)
        stopping.start()
        stopping.join(CLOSE_SECONDS)
        for exporter in self._exporters:
            exporter.say_lost()

    def __enter__(self) -> Telemetry:
        _open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        self.close()


_OFF = Span(None)
_NOTHING = Telemetry()
_open: list[Telemetry] = []  # those that a `with` of this process is in, the innermost last


def from_environment(**resource: Any) -> Telemetry:
    """Telemetry to where the environment says. `resource`: who sends, such as `run` and `rank`.

    Raises UserError for an endpoint that is no address, or when `MC_OTEL_ENDPOINT` is set and the packages are missing.
    """
    return Telemetry(otlp.destination("traces", os.environ), otlp.destination("metrics", os.environ), **resource)


@contextmanager
def opened(**resource: Any) -> Iterator[Telemetry]:
    """The telemetry that the process has open; where it has none, one by `from_environment`, closed at the end."""
    if _open:
        yield _open[-1]
        return
    with from_environment(**resource) as telemetry:
        yield telemetry


def active() -> Telemetry:
    """The telemetry that the process has open, or one that does nothing."""
    return _open[-1] if _open else _NOTHING


def span(name: str, **values: Any) -> AbstractContextManager[Span]:
    """`Telemetry.span` of the telemetry that the process has open."""
    return active().span(name, **values)


def traced(name: str, items: Generator[Item, None, None], **values: Any) -> Iterator[Item]:
    """What a generator yields, made below a span that lasts from the first item asked for to the last; `items` counts them."""
    span, made = active().start(name, **values), 0
    try:
        while True:
            with span.here():
                try:
                    item = next(items)
                except StopIteration:
                    return
            made += 1
            yield item
    finally:
        items.close()
        span.set(items=made)
        span.end()


def carrier() -> dict[str, str]:
    """The variable that makes the spans of a new process children of the span that this thread is in; empty without one."""
    above = _current.get()
    if above is None or above._span is None:
        return {}
    context = above._span.get_span_context()
    return {PARENT: f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"}


def attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """`mc.<key>` attributes that OTLP can carry: numbers, words and lists; None and not-finite numbers are left out."""
    found = {f"mc.{key}": _plain(value) for key, value in values.items()}
    return {key: value for key, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        if all(isinstance(item, int) for item in value):
            return list(value)
        if all(isinstance(item, int | float) for item in value):
            return [float(item) for item in value]
        return [redact(str(item)) for item in value]
    return redact(str(value))


class FocusNumbers(Protocol):
    """What `context.FocusReport` says about a refocus; all of it numbers."""

    @property
    def refocus(self) -> int: ...
    @property
    def budget(self) -> int: ...
    @property
    def edits(self) -> int: ...
    @property
    def swap_rate(self) -> float: ...
    @property
    def utilization(self) -> float: ...
    @property
    def removed_age_mean(self) -> float: ...
    @property
    def removed_age_p95(self) -> float: ...


class Tiling(Protocol):
    """What `context.WorkingContext` says about its entries."""

    @property
    def lod(self) -> Any: ...
    @property
    def positions(self) -> Any: ...
    @property
    def tokens(self) -> int: ...


_AS_REPORTED = (
    "refocus", "entries", "budget", "edits", "expands", "collapses", "forced_collapses", "forced_reversals",
    "swap_rate", "utilization", "score_mean", "score_std", "score_min", "score_max",
)  # fmt: skip


def focus_values(report: FocusNumbers) -> dict[str, Any]:
    """Values of a `focus_allocator` event. Residency is the age, in refocuses, of entries when they were edited away."""
    values = {name: getattr(report, name) for name in _AS_REPORTED}
    return values | {"residency_mean": report.removed_age_mean, "residency_p95": report.removed_age_p95}


def context_values(context: Tiling) -> dict[str, Any]:
    """Values of a `working_context_snapshot` event."""
    return {
        "tokens": context.tokens,
        "entries": len(context.lod),
        "lods": context.lod,
        "positions": context.positions,
        "lod_counts": np.bincount(context.lod),
    }
