"""Telemetry over OTLP: real spans that nest, at a collector that listens, that hangs, that is not there, or with none set."""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from allocators import allocator_config
from collector import Collector, plain
from patience import PATIENCE_S

from megacontext.context.allocator import FocusAllocator
from megacontext.context.working_context import WorkingContext
from megacontext.errors import UserError
from megacontext.telemetry import otel, otlp


def test_spans_nest_have_durations_and_carry_events(collector: Collector) -> None:
    context = WorkingContext.initial(4096, 32, 200, 32)
    allocator = FocusAllocator(allocator_config(budget=200, recent_tokens=32))
    scores = np.linspace(-0.5, 0.9, len(context))
    after, report = allocator.refocus(
        context, lambda c: scores[: len(c)] if len(c) == len(scores) else np.zeros(len(c))
    )
    with otel.from_environment(run="r", rank=0) as telemetry:
        assert telemetry.enabled
        with telemetry.span("train_step", step=3) as step:
            time.sleep(0.02)
            with telemetry.span("refocus"):
                telemetry.event("focus_allocator", **otel.focus_values(report))
                telemetry.event("working_context_snapshot", **otel.context_values(after))
            step.event("mc_timing", total_ms=1.5, build_ms=math.nan)
        telemetry.event("delta_nll", value=0.04, horizon=32)
    assert collector.paths <= {"/v1/traces"}
    (sender,) = {tuple(sorted(found.items())) for found in collector.senders()}
    assert {"mc.run": "r", "mc.rank": 0, "host.name": platform.node(), "service.name": "megacontext"}.items() <= dict(
        sender
    ).items()
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
    telemetry = otel.from_environment()

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
    telemetry = otel.from_environment()
    with pytest.raises(ValueError, match="the user said"), telemetry.span("request"):
        raise ValueError("the user said something private")
    telemetry.close()
    span = collector.spans()["request"]
    assert (span.status.code, span.status.message) == (2, "ValueError")
    assert b"private" not in collector.content


def test_secrets_do_not_leave(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with otel.from_environment(command="train --key 0123456789abcdef") as telemetry:
        telemetry.event("inference_update", note=["0123456789abcdef"], shape=(1, 2), mixed=[1, 2.5])
    assert b"0123456789abcdef" not in collector.content
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
    kind: str, protocol: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is raised and the end comes; the work never waits for a request (the queue takes it or drops it)."""
    monkeypatch.setattr(otlp, "SEND_SECONDS", 0.4)
    monkeypatch.setattr(otel, "CLOSE_SECONDS", 0.8)
    monkeypatch.setattr(otlp, "_said", set())
    server = Collector(protocol, hang=kind == "hangs", status=400) if kind in ("hangs", "refuses") else None
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{unused.getsockname()[1]}"
    address = server.address if server else free if kind == "absent" else "collector.invalid:4318"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    telemetry = otel.from_environment()
    busy_work(telemetry, 2000)  # twice what the queue holds
    deadline = time.perf_counter() + PATIENCE_S
    while not telemetry._exporters[0].lost and time.perf_counter() < deadline:
        time.sleep(0.02)
    telemetry.close()
    telemetry.close()
    if server is not None:
        server.close()
    out, err = capfd.readouterr()
    assert out.count(f"takes no traces over {protocol}; the run goes on") == 1
    assert "lost" in out
    assert "Failed to export" not in err
    busy_work(telemetry, 3)  # closed: nothing happens


def test_off_means_off() -> None:
    """Without an endpoint nothing is imported, and the calls are there all the same."""
    code = """
import sys
from megacontext.stages import TOK_EVAL
from megacontext.telemetry import otel, otlp
with otel.opened(run="r") as t:
    assert not t.enabled and otel.active() is t
    with otel.span("a", x=1) as span:
        span.event("mc_timing", total_ms=1)
        span.set(y=2)
        t.event("mc_timing", total_ms=1)
        assert otel.carrier() == {}
    t.start("b").end()
    t.gauges({"train/loss": 1.0})
assert otel.active() is not t
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


def test_an_interpreter_that_ends_sends_what_waits(collector: Collector) -> None:
    code = f"""
from megacontext.stages import TOK_EVAL
from megacontext.telemetry import otel, otlp
otlp.SEND_SECONDS = otel.CLOSE_SECONDS = {PATIENCE_S}
with otel.from_environment().span("last"):
    pass
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)
    assert "last" in collector.spans()


def test_an_interpreter_ends_although_its_collector_hangs(protocol: str) -> None:
    server = Collector(protocol, hang=True)
    code = """
from megacontext.stages import TOK_EVAL
from megacontext.telemetry import otel, otlp
otel.CLOSE_SECONDS = 0.2
with otel.opened(), otel.span("last"):
    otel.active().gauges({"train/loss": 1.0})
"""
    variables = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": server.url, "OTEL_EXPORTER_OTLP_TIMEOUT": "100000"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S, env=variables)
    server.close()


def test_the_standard_variables_are_enough(patient: None, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans and metrics go to the standard endpoint, with its headers and the sender's name, below the parent given."""
    server = Collector(protocol)
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": server.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Basic%20abc",
        "OTEL_SERVICE_NAME": "mine",
        "OTEL_RESOURCE_ATTRIBUTES": "team=blue,host.name=box",
        otel.PARENT: f"00-{7:032x}-{9:016x}-01",
    }.items():
        monkeypatch.setenv(name, value)
    with otel.opened(run="r", rank=1) as telemetry:
        with otel.span("outer"):
            carried = otel.carrier()[otel.PARENT].split("-")
        with otel.opened(run="another") as same:
            assert same is telemetry
        telemetry.gauges({"train/loss": 2.5, "val/bpb": math.nan})
    outer = server.spans()["outer"]
    assert (outer.trace_id, outer.parent_span_id) == ((7).to_bytes(16, "big"), (9).to_bytes(8, "big"))
    assert [carried[1], carried[2]] == [outer.trace_id.hex(), outer.span_id.hex()]
    assert server.gauges() == {"train/loss": 2.5}
    assert {headers["authorization"] for headers in server.headers} == {"Basic abc"}
    (sender,) = server.senders()
    assert {
        "service.name": "mine", "team": "blue", "host.name": "box", "mc.run": "r", "mc.rank": 1,
    }.items() <= sender.items()  # fmt: skip
    server.close()


BASE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4318/otlp/"}
GRPC = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}


@pytest.mark.parametrize(
    ("given", "traces", "metrics"),
    [
        ({}, None, None),
        ({otlp.ENDPOINT: "host:4318", otlp.INSECURE: "1"}, "http://host:4318/v1/traces", None),
        ({otlp.ENDPOINT: "host:4318"}, "https://host:4318/v1/traces", None),
        ({otlp.ENDPOINT: "http://host:4318"}, "http://host:4318/v1/traces", None),
        ({otlp.ENDPOINT: "https://host/own/path", otlp.INSECURE: "1"}, "https://host/own/path", None),
        ({otlp.ENDPOINT: "host:4317", **GRPC}, "https://host:4317", None),
        ({otlp.ENDPOINT: "host:4317", "OTEL_EXPORTER_OTLP_INSECURE": "true"}, "http://host:4317/v1/traces", None),
        (BASE, "http://all:4318/otlp/v1/traces", "http://all:4318/otlp/v1/metrics"),
        ({**BASE, otlp.ENDPOINT: "http://one:1"}, "http://one:1/v1/traces", "http://all:4318/otlp/v1/metrics"),
        (
            {**BASE, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t:1/in", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://m:2"},
            "http://t:1/in",
            "http://m:2/",
        ),
        ({**GRPC, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4317"}, "http://all:4317", "http://all:4317"),
        ({**GRPC, "OTEL_EXPORTER_OTLP_ENDPOINT": "all:4317", "OTEL_EXPORTER_OTLP_INSECURE": "true"}, *["http://all:4317"] * 2),
        ({**BASE, "OTEL_TRACES_EXPORTER": "none"}, None, "http://all:4318/otlp/v1/metrics"),
        ({**BASE, "OTEL_METRICS_EXPORTER": "none"}, "http://all:4318/otlp/v1/traces", None),
        ({**BASE, "OTEL_METRICS_EXPORTER": "prometheus"}, "http://all:4318/otlp/v1/traces", None),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4318/v1/traces", None),
        ({"OTEL_TRACES_EXPORTER": "console"}, "", None),
        ({**BASE, otlp.ENDPOINT: "http://one:1", "OTEL_SDK_DISABLED": "true"}, None, None),
    ],
)  # fmt: skip
def test_addresses(given: dict[str, str], traces: str | None, metrics: str | None) -> None:
    targets = [otlp.destination(signal, given) for signal in ("traces", "metrics")]
    assert [target.endpoint if target else None for target in targets] == [traces, metrics]


@pytest.mark.parametrize("endpoint", ["grpc://host:4317", "http://", "two words:1"])
@pytest.mark.parametrize("name", [otlp.ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"])
def test_what_is_no_address_is_a_user_error(name: str, endpoint: str) -> None:
    with pytest.raises(UserError, match=f"{name} is .*OTLP collector"):
        otlp.destination("traces", {name: endpoint})


def test_unknown_choices_are_named_once_and_ignored(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "_said", set())
    for _ in range(2):
        found = otlp.destination(
            "traces", {**BASE, "OTEL_TRACES_EXPORTER": "otlp,zipkin", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}
        )
    assert found == otlp.Destination("traces", "http://all:4318/otlp/v1/traces")
    said = capsys.readouterr().out
    assert said.count("'zipkin', which is ignored") == said.count("'http/json', which is ignored") == 1


def test_console_spans_are_lines_of_json(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from megacontext.stages import TOK_EVAL
from megacontext.telemetry import otel, otlp
with otel.opened(), otel.span("shown", x=1):
    pass
"""
    variables = {**os.environ, "OTEL_TRACES_EXPORTER": "console"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S, env=variables)
    (line,) = capfd.readouterr().out.splitlines()
    assert (json.loads(line)["name"], json.loads(line)["attributes"]) == ("shown", {"mc.x": 1})


def test_missing_packages_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They end the job where our own variable asks for telemetry; the standard ones may be meant for other programs."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setattr(otlp, "_said", set())
    target = otlp.Destination("traces", "http://127.0.0.1:1/v1/traces")
    assert not otel.Telemetry(target).enabled
    assert "megacontext[otel]" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"megacontext\[otel\]"):
        otel.Telemetry(replace(target, demanded=True))
