"""Spans and events over OTLP (HTTP) when `MC_OTEL_ENDPOINT` is set; nothing at all otherwise.

A collector that is slow, broken or absent never stops or slows a run: spans wait in a bounded queue, a thread sends
them with short timeouts, what does not fit is dropped, and closing waits a few seconds at most. Names are those that
users of the first prototype know: attributes `mc.<key>`, events in `EVENTS`.

    telemetry = otel.from_environment(run="speedrun", stage="base")
    with telemetry.span("train_step", step=7) as step:
        with telemetry.span("refocus"):
            telemetry.event("focus_allocator", **focus_values(report))
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np

from megacontext.errors import UserError
from megacontext.telemetry.provenance import redact

ENDPOINT, INSECURE = "MC_OTEL_ENDPOINT", "MC_OTEL_INSECURE"
EVENTS = frozenset(
    ("mc_tree_snapshot", "working_context_snapshot", "focus_allocator", "mc_timing", "delta_nll", "mc_batch_stats", "inference_update")
)  # fmt: skip
SEND_SECONDS = 3.0  # for one batch, retries included
CLOSE_SECONDS = 3.0  # for everything that still waits
_QUEUE_SPANS, _BATCH_SPANS, _DELAY_MS = 1024, 64, 1000.0

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


class Telemetry:
    """Where spans and events go. Without an endpoint every call does nothing, and OpenTelemetry is not even imported."""

    def __init__(self, endpoint: str = "", **resource: Any) -> None:
        """`endpoint`: full URL of the collector's traces; `resource`: who sends (`run`, `stage`, `rank`).

        Raises UserError when an endpoint is given and the packages are not installed.
        """
        self.endpoint = endpoint
        self._provider: Any = None
        self._tracer: Any = None
        if endpoint:
            self._provider, self._exporter = _provider(endpoint, resource)
            self._tracer = self._provider.get_tracer("megacontext")
            atexit.register(self.close)

    @property
    def enabled(self) -> bool:
        """Whether anything is sent; ask before computing what only an event needs."""
        return self._tracer is not None

    @contextmanager
    def span(self, name: str, parent: Span | None = None, **values: Any) -> Iterator[Span]:
        """A span around a block of code, below `parent` or the span that this thread is in; an exception marks it."""
        if self._tracer is None:
            yield _OFF
            return
        span = self.start(name, parent, **values)
        token = _current.set(span)
        try:
            yield span
        except BaseException as error:
            span.fail(error)
            raise
        finally:
            _current.reset(token)
            span.end()

    def start(self, name: str, parent: Span | None = None, **values: Any) -> Span:
        """A span that the caller ends, for work that outlives a function: a request, a generator, another thread.

        It is nobody's current span; give it as `parent` to those within it.
        """
        if self._tracer is None:
            return _OFF
        from opentelemetry.trace import INVALID_SPAN, set_span_in_context

        above = parent or _current.get()
        context = set_span_in_context(INVALID_SPAN if above is None or above._span is None else above._span)
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

    def close(self) -> None:
        """Send what waits, for `CLOSE_SECONDS` at most, and stop. Closing twice is fine."""
        provider, self._provider, self._tracer = self._provider, None, None
        if provider is None:
            return
        atexit.unregister(self.close)
        # The provider's own shutdown waits up to 30 s for a collector that hangs.
        stopping = threading.Thread(target=provider.shutdown, name="otel-close", daemon=True)
        stopping.start()
        stopping.join(CLOSE_SECONDS)
        self._exporter.say_lost()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_OFF = Span(None)


def from_environment(environment: Mapping[str, str] | None = None, **resource: Any) -> Telemetry:
    """Telemetry as `MC_OTEL_ENDPOINT` (`host:port` or a URL) and `MC_OTEL_INSECURE=1` (no TLS) say; off without them.

    Raises UserError for an endpoint that is no address, or when the packages are missing.
    """
    source = os.environ if environment is None else environment
    return Telemetry(traces_url(source.get(ENDPOINT, ""), source.get(INSECURE) == "1"), **resource)


def traces_url(endpoint: str, insecure: bool) -> str:
    """`host:port` as the URL of its traces: https, or http when insecure; a URL keeps its scheme and path."""
    endpoint = endpoint.strip()
    if not endpoint:
        return ""
    scheme, found, rest = endpoint.rpartition("://")
    if not found:
        scheme = "http" if insecure else "https"
    host, _, path = rest.partition("/")
    if scheme not in ("http", "https") or not host or any(c.isspace() for c in host):
        raise UserError(
            f"{ENDPOINT} is {redact(endpoint)!r}; give host:port or an http(s) URL of an OTLP/HTTP collector."
        )
    return f"{scheme}://{host}/{path or 'v1/traces'}"


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


def runtime_metrics(report: FocusNumbers) -> dict[str, float]:
    """The `runtime/…` metrics of a refocus, those that are known."""
    found = {
        "runtime/swap_rate": report.swap_rate,
        "runtime/residency": report.removed_age_mean,
        "runtime/token_budget_utilization": report.utilization,
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def context_values(context: Tiling) -> dict[str, Any]:
    """Values of a `working_context_snapshot` event."""
    return {
        "tokens": context.tokens,
        "entries": len(context.lod),
        "lods": context.lod,
        "positions": context.positions,
        "lod_counts": np.bincount(context.lod),
    }


class _Reporting:
    """An exporter that says once that nothing arrives, and at the end how much was lost, instead of logging each batch."""

    def __init__(self, inner: Any, endpoint: str) -> None:
        self._inner, self._endpoint = inner, endpoint
        self.sent = self.lost = 0

    def export(self, spans: Any) -> Any:
        result = self._inner.export(spans)
        if result.name == "SUCCESS":
            self.sent += len(spans)
        else:
            if not self.lost:
                print(
                    f"telemetry: the collector at {redact(self._endpoint)} takes no spans; the run goes on.", flush=True
                )
            self.lost += len(spans)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True

    def say_lost(self) -> None:
        if self.lost:
            print(f"telemetry: {self.sent} spans sent, at least {self.lost} lost.", flush=True)


def _provider(endpoint: str, resource: Mapping[str, Any]) -> tuple[Any, _Reporting]:
    """A tracer provider of ours alone (the process's global one is left to others, such as Ray) and its exporter."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UserError(
            f"{ENDPOINT} is set, but OpenTelemetry is not installed ({error}); pip install 'megacontext[otel]', or unset it."
        ) from error
    for name in ("opentelemetry.exporter.otlp", "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a line per batch, for as long as the collector is away
    exporter = _Reporting(OTLPSpanExporter(endpoint=endpoint, timeout=SEND_SECONDS), endpoint)
    who = Resource.create({"service.name": "megacontext", **attributes(resource)})
    provider = TracerProvider(resource=who, shutdown_on_exit=False)
    adapter: Any = exporter
    provider.add_span_processor(
        BatchSpanProcessor(
            adapter,
            max_queue_size=_QUEUE_SPANS,
            schedule_delay_millis=_DELAY_MS,
            max_export_batch_size=_BATCH_SPANS,
        )
    )
    return provider, exporter
