"""Exporters of spans and metrics, as OpenTelemetry's standard variables and `MC_OTEL_ENDPOINT` name them.

`cluster/README.md` lists the variables. Headers, certificates, compression, sampler and the attributes of the sender are
read by OpenTelemetry's SDK itself. A variable that asks for something unknown is named on stdout and ignored.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megacontext.errors import UserError
from megacontext.telemetry.provenance import redact

ENDPOINT, INSECURE = "MC_OTEL_ENDPOINT", "MC_OTEL_INSECURE"
OTLP = "OTEL_EXPORTER_OTLP_"
PROTOCOLS = ("http/protobuf", "grpc")
EXPORTERS = ("otlp", "console", "none")
SEND_SECONDS = 3.0  # for one batch, retries included; OTEL_EXPORTER_OTLP_TIMEOUT replaces it
_QUEUE_SPANS, _BATCH_SPANS, _DELAY_MS = 1024, 64, 1000.0
_METRICS_EVERY_MS = 10_000.0
_said: set[str] = set()


@dataclass(frozen=True)
class Destination:
    """Where one signal, `traces` or `metrics`, goes: to an OTLP collector at `endpoint`, to stdout (`console`), or both.

    endpoint: the full URL for http/protobuf, scheme and host for grpc; empty without a collector.
    demanded: whether `MC_OTEL_ENDPOINT` names the collector, so that missing packages end the job.
    """

    signal: str
    endpoint: str = ""
    protocol: str = "http/protobuf"
    console: bool = False
    demanded: bool = False


def destination(signal: str, environment: Mapping[str, str]) -> Destination | None:
    """Where the environment sends a signal (`traces` or `metrics`); None when it sends the signal nowhere.

    Raises UserError when the endpoint is no address.
    """

    def asked(name: str) -> str:
        """The variable of this signal, else that of all signals."""
        own = environment.get(f"{OTLP}{signal.upper()}_{name}", "").strip()
        return own or environment.get(OTLP + name, "").strip()

    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    ours = environment.get(ENDPOINT, "").strip() if signal == "traces" else ""
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    chosen = [name for name in (part.strip().lower() for part in environment.get(variable, "").split(",")) if name]
    exporters = _known(variable, chosen, EXPORTERS) if chosen else ["otlp"] if ours or asked("ENDPOINT") else []
    if not exporters or "none" in exporters:
        return None
    protocol = asked("PROTOCOL").lower()
    protocol = next(iter(_known(f"{OTLP}PROTOCOL", [protocol] if protocol else [], PROTOCOLS)), PROTOCOLS[0])
    if "otlp" not in exporters:
        return Destination(signal, protocol=protocol, console=True)
    name = next((name for name in (f"{OTLP}{signal.upper()}_ENDPOINT", f"{OTLP}ENDPOINT") if environment.get(name)), "")
    address = ours or asked("ENDPOINT") or f"http://localhost:{4317 if protocol == 'grpc' else 4318}"
    insecure = (environment.get(INSECURE, "") if ours else "") or asked("INSECURE")
    scheme, has_scheme, rest = address.rpartition("://")
    if not has_scheme:
        scheme = "http" if insecure.lower() in ("1", "true") else "https"
    host, _, path = rest.partition("/")
    if scheme not in ("http", "https") or not host or any(letter.isspace() for letter in rest):
        named = ENDPOINT if ours else name
        raise UserError(f"{named} is {redact(address)!r}; give host:port or an http(s) URL of an OTLP collector.")
    if protocol == "grpc":
        endpoint = f"{scheme}://{host}"
    elif ours:
        endpoint = f"{scheme}://{host}/{path or 'v1/traces'}"
    elif name.endswith(f"{signal.upper()}_ENDPOINT"):
        endpoint = f"{scheme}://{host}/{path}"
    else:  # the address of all signals
        endpoint = "/".join((f"{scheme}://{host}", *filter(None, (path.strip("/"), f"v1/{signal}"))))
    return Destination(signal, endpoint, protocol, "console" in exporters, bool(ours))


def _known(variable: str, values: list[str], known: tuple[str, ...]) -> list[str]:
    """The known ones of the values of a variable. Each unknown one is named once."""
    for value in values:
        if value not in known:
            say(f"{variable} is {value!r}, which is ignored; known are {', '.join(known)}")
    return [value for value in values if value in known]


def say(text: str) -> None:
    """Print a line about telemetry; the same line once a process."""
    if text not in _said:
        _said.add(text)
        print(f"telemetry: {text}", flush=True)


def sender(attributes: Mapping[str, Any]) -> Any:
    """Resource of all that is sent: who sends it. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` win over ours."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    ours = {"service.name": "megacontext", "host.name": platform.node(), **attributes}
    return Resource.create({**ours, **OTELResourceDetector().detect().attributes})


def tracer_provider(target: Destination, resource: Any) -> tuple[Any, list[Reporting]]:
    """A tracer provider of ours alone, and its exporters. The process's global provider is left to others, such as Ray."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    exporters = [Reporting(_otlp(target), target)] if target.endpoint else []
    shown: list[Any] = [ConsoleSpanExporter(formatter=lambda span: span.to_json(indent=None) + "\n")]
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters + shown * target.console:
        provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=_QUEUE_SPANS,
                schedule_delay_millis=_DELAY_MS,
                max_export_batch_size=_BATCH_SPANS,
            )
        )
    return provider, exporters


def meter_provider(target: Destination, resource: Any) -> tuple[Any, list[Reporting]]:
    """A meter provider of ours alone, and its exporters."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

    exporters = [Reporting(_otlp(target), target)] if target.endpoint else []
    shown: list[Any] = [ConsoleMetricExporter(formatter=lambda metrics: metrics.to_json(indent=None) + "\n")]
    every = None if os.environ.get("OTEL_METRIC_EXPORT_INTERVAL") else _METRICS_EVERY_MS
    readers = [PeriodicExportingMetricReader(exporter, every) for exporter in exporters + shown * target.console]
    return MeterProvider(readers, resource=resource, shutdown_on_exit=False), exporters


def _otlp(target: Destination) -> Any:
    """The OTLP exporter of a signal. Raises ImportError when its package is not installed."""
    name = "OTLPSpanExporter" if target.signal == "traces" else "OTLPMetricExporter"
    kind = "trace" if target.signal == "traces" else "metric"
    package = "grpc" if target.protocol == "grpc" else "http"
    module = importlib.import_module(f"opentelemetry.exporter.otlp.proto.{package}.{kind}_exporter")
    for quiet in ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal", "opentelemetry.sdk.metrics"):
        logging.getLogger(quiet).setLevel(logging.CRITICAL)  # a line per batch, for as long as the collector is away
    timed = any(os.environ.get(f"{OTLP}{part}TIMEOUT") for part in ("", f"{target.signal.upper()}_"))
    settings: dict[str, Any] = {"endpoint": target.endpoint, "timeout": None if timed else SEND_SECONDS}
    if target.protocol == "grpc":
        settings["insecure"] = target.endpoint.startswith("http://")
    return getattr(module, name)(**settings)


class Reporting:
    """An exporter that says once that nothing arrives, and at the end how much was lost, instead of logging each batch."""

    def __init__(self, inner: Any, target: Destination) -> None:
        self._inner, self._target = inner, target
        self.sent = self.lost = 0  # spans, or reports of metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # what the SDK asks of an exporter of metrics

    def export(self, batch: Any, **others: Any) -> Any:
        """Send a batch. What OpenTelemetry or the network raises counts as lost, and goes on to the SDK."""
        arrived = False
        try:
            result = self._inner.export(batch, **others)
            arrived = result.name == "SUCCESS"
            return result
        finally:
            self._count(len(batch) if isinstance(batch, list | tuple) else 1, arrived)

    def _count(self, size: int, arrived: bool) -> None:
        if arrived:
            self.sent += size
            return
        if not self.lost:
            other = "http/protobuf (port 4318)" if self._target.protocol == "grpc" else "grpc (port 4317)"
            say(
                f"the collector at {redact(self._target.endpoint)} takes no {self._target.signal} over "
                f"{self._target.protocol}; the run goes on. A collector that speaks {other} needs {OTLP}PROTOCOL"
            )
        self.lost += size

    def shutdown(self, *times: Any, **others: Any) -> None:
        self._inner.shutdown(*times, **others)

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def say_lost(self) -> None:
        """Say how much of what was sent did not arrive."""
        if self.lost:
            what = "spans" if self._target.signal == "traces" else "reports of metrics"
            print(f"telemetry: {self.sent} {what} sent, at least {self.lost} lost.", flush=True)
