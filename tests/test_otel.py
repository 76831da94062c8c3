"""Telemetry over OTLP: real spans that nest, at a collector that listens, that hangs, that is not there, or with none set."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from patience import PATIENCE_S

from megacontext.context.allocator import AllocatorConfig, FocusAllocator
from megacontext.context.working_context import WorkingContext
from megacontext.errors import UserError
from megacontext.telemetry import otel


class Collector:
    """An OTLP/HTTP server that keeps what it gets; with `hang` it takes requests and never answers."""

    def __init__(self, hang: bool = False, status: int = 200) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        self.hung = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.bodies.append((self.path, body))
                if hang:
                    collector.hung.wait()
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_port}"

    def spans(self) -> dict[str, Any]:
        found = {}
        for _, body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found.update({span.name: span for span in scope.spans})
        return found

    def close(self) -> None:
        self.hung.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector, and the patience that it needs on a busy machine."""
    monkeypatch.setattr(otel, "SEND_SECONDS", PATIENCE_S)
    monkeypatch.setattr(otel, "CLOSE_SECONDS", PATIENCE_S)
    server = Collector()
    yield server
    server.close()


def plain(attributes: Any) -> dict[str, Any]:
    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        found = getattr(any_value, kind)
        return [value(item) for item in found.values] if kind == "array_value" else found

    return {item.key: value(item.value) for item in attributes}


def connect(address: str, **resource: Any) -> otel.Telemetry:
    return otel.from_environment({otel.ENDPOINT: address, otel.INSECURE: "1"}, **resource)


def test_spans_nest_have_durations_and_carry_events(collector: Collector) -> None:
    context = WorkingContext.initial(4096, 32, 200, 32)
    allocator = FocusAllocator(AllocatorConfig(budget=200, recent_tokens=32))
    scores = np.linspace(-0.5, 0.9, len(context))
    after, report = allocator.refocus(
        context, lambda c: scores[: len(c)] if len(c) == len(scores) else np.zeros(len(c))
    )
    with connect(collector.address, run="r", rank=0) as telemetry:
        assert telemetry.enabled
        with telemetry.span("train_step", step=3) as step:
            time.sleep(0.02)
            with telemetry.span("refocus"):
                telemetry.event("focus_allocator", **otel.focus_values(report))
                telemetry.event("working_context_snapshot", **otel.context_values(after))
            step.event("mc_timing", total_ms=1.5, build_ms=math.nan)
        telemetry.event("delta_nll", value=0.04, horizon=32)
    assert {path for path, _ in collector.bodies} == {"/v1/traces"}
    spans = collector.spans()
    assert set(spans) == {"train_step", "refocus", "delta_nll"}
    step_span, inner, alone = spans["train_step"], spans["refocus"], spans["delta_nll"]
    assert inner.parent_span_id == step_span.span_id
    assert inner.trace_id == step_span.trace_id
    assert step_span.parent_span_id == alone.parent_span_id == b""
    assert step_span.end_time_unix_nano - step_span.start_time_unix_nano >= 20_000_000
    assert step_span.start_time_unix_nano <= inner.start_time_unix_nano <= inner.end_time_unix_nano
    assert inner.end_time_unix_nano <= step_span.end_time_unix_nano
    assert plain(step_span.attributes) == {"mc.step": 3}
    assert plain(step_span.events[0].attributes) == {"mc.total_ms": 1.5}  # what is not a number is left out
    focus, snapshot = inner.events
    numbers = plain(focus.attributes)
    assert focus.name == "focus_allocator"
    assert numbers["mc.edits"] == report.edits == numbers["mc.expands"] + numbers["mc.collapses"]
    assert numbers["mc.swap_rate"] == report.swap_rate
    assert {"mc.score_mean", "mc.score_std", "mc.score_min", "mc.score_max", "mc.utilization"} <= set(numbers)
    assert plain(snapshot.attributes)["mc.lods"] == after.lod.tolist()
    assert plain(snapshot.attributes)["mc.positions"] == after.positions.tolist()


def test_a_generator_gives_its_span_as_parent_and_threads_do_not_mix(collector: Collector) -> None:
    telemetry = connect(collector.address)

    def generate() -> Iterator[int]:
        request = telemetry.start("request")
        for token in range(2):
            with telemetry.span(f"decode{token}", parent=request):
                pass
            yield token
        request.end()

    def other() -> None:
        with telemetry.span("elsewhere"):
            pass

    for token in generate():
        with telemetry.span(f"consumer{token}"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    telemetry.close()
    spans = collector.spans()
    assert {spans[f"decode{n}"].parent_span_id for n in (0, 1)} == {spans["request"].span_id}
    assert spans["consumer0"].parent_span_id == spans["elsewhere"].parent_span_id == b""


def test_an_error_marks_its_span_without_its_words(collector: Collector) -> None:
    telemetry = connect(collector.address)
    with pytest.raises(ValueError, match="the user said"), telemetry.span("request"):
        raise ValueError("the user said something private")
    telemetry.close()
    span = collector.spans()["request"]
    assert (span.status.code, span.status.message) == (2, "ValueError")
    assert b"private" not in b"".join(body for _, body in collector.bodies)


def test_secrets_do_not_leave(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with connect(collector.address, command="train --key 0123456789abcdef") as telemetry:
        telemetry.event("inference_update", note=["0123456789abcdef"], shape=(1, 2), mixed=[1, 2.5])
    assert b"0123456789abcdef" not in b"".join(body for _, body in collector.bodies)
    (event,) = collector.spans()["inference_update"].events
    assert plain(event.attributes) == {"mc.note": ["***"], "mc.shape": [1, 2], "mc.mixed": [1.0, 2.5]}


def busy_work(telemetry: otel.Telemetry, spans: int) -> float:
    began = time.perf_counter()
    for step in range(spans):
        with telemetry.span("step", step=step):
            telemetry.event("mc_timing", total_ms=1.0)
    return time.perf_counter() - began


@pytest.mark.parametrize("kind", ["hangs", "refuses", "absent", "no such host"])
def test_a_bad_collector_does_not_stop_a_run(
    kind: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is raised and the end comes; the work never waits for a request (the queue takes it or drops it)."""
    monkeypatch.setattr(otel, "SEND_SECONDS", 0.4)
    monkeypatch.setattr(otel, "CLOSE_SECONDS", 0.8)
    server = Collector(hang=kind == "hangs", status=400) if kind in ("hangs", "refuses") else None
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{unused.getsockname()[1]}"
    telemetry = connect(server.address if server else free if kind == "absent" else "collector.invalid:4318")
    busy_work(telemetry, 2000)  # twice what the queue holds
    deadline = time.perf_counter() + PATIENCE_S
    while not telemetry._exporter.lost and time.perf_counter() < deadline:
        time.sleep(0.02)
    telemetry.close()
    telemetry.close()
    if server is not None:
        server.close()
    out, err = capfd.readouterr()
    assert out.count("takes no spans; the run goes on") == 1
    assert "lost" in out
    assert "Failed to export" not in err
    busy_work(telemetry, 3)  # closed: nothing happens


def test_off_means_off() -> None:
    """Without an endpoint nothing is imported, and the calls are there all the same."""
    code = """
import sys
from megacontext.telemetry import otel
t = otel.from_environment({})
assert not t.enabled
with t.span("a", x=1) as span:
    span.event("mc_timing", total_ms=1)
    span.set(y=2)
    t.event("mc_timing", total_ms=1)
t.start("b").end()
t.close()
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


def test_an_interpreter_that_ends_sends_what_waits(collector: Collector) -> None:
    code = f"""
from megacontext.telemetry import otel
otel.SEND_SECONDS = otel.CLOSE_SECONDS = {PATIENCE_S}
t = otel.from_environment({{"MC_OTEL_ENDPOINT": "{collector.address}", "MC_OTEL_INSECURE": "1"}})
with t.span("last"):
    pass
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)
    assert "last" in collector.spans()


@pytest.mark.parametrize(
    ("endpoint", "insecure", "url"),
    [
        ("", True, ""),
        ("host:4318", True, "http://host:4318/v1/traces"),
        ("host:4318", False, "https://host:4318/v1/traces"),
        ("http://host:4318", False, "http://host:4318/v1/traces"),
        ("https://host/otlp/v1/traces", True, "https://host/otlp/v1/traces"),
    ],
)
def test_addresses(endpoint: str, insecure: bool, url: str) -> None:
    assert otel.traces_url(endpoint, insecure) == url


@pytest.mark.parametrize("endpoint", ["grpc://host:4317", "http://", "two words:1"])
def test_what_is_no_address_is_a_user_error(endpoint: str) -> None:
    with pytest.raises(UserError, match="OTLP/HTTP collector"):
        otel.traces_url(endpoint, True)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match=r"megacontext\[otel\]"):
        connect("127.0.0.1:1")


def test_runtime_metrics_leave_out_what_is_unknown() -> None:
    context = WorkingContext.all_raw(100, 32)
    _, report = FocusAllocator(AllocatorConfig(budget=128, recent_tokens=16)).refocus(
        context, lambda c: np.zeros(len(c))
    )
    assert otel.runtime_metrics(report) == {
        "runtime/swap_rate": 0.0,
        "runtime/token_budget_utilization": 100 / 128,
    }
