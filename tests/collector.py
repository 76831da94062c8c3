"""An OpenTelemetry collector within the test process, over HTTP or gRPC."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


class Collector:
    """An OTLP server that keeps what it gets; with `hang` it takes requests and never answers.

    status: of an HTTP answer; a gRPC call is refused unless it is 200.
    """

    def __init__(self, protocol: str = "http/protobuf", hang: bool = False, status: int = 200) -> None:
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.paths: set[str] = set()
        self.hung = threading.Event()
        (self._serve_grpc if protocol == "grpc" else self._serve_http)(hang, status)

    def _serve_http(self, hang: bool, status: int) -> None:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.paths.add(self.path)
                collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                if self.path.endswith("metrics"):
                    collector.metrics.append(ExportMetricsServiceRequest.FromString(body))
                else:
                    collector.traces.append(ExportTraceServiceRequest.FromString(body))
                if hang:
                    collector.hung.wait()
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.port, self._stop = server.server_port, lambda: (server.shutdown(), server.server_close())

    def _serve_grpc(self, hang: bool, status: int) -> None:
        def export(kept: list[Any], answer: Any) -> Any:
            def call(_: Any, request: Any, context: grpc.ServicerContext) -> Any:
                kept.append(request)
                self.headers.append({str(key): str(value) for key, value in context.invocation_metadata()})
                if hang:
                    self.hung.wait()
                if status != 200:
                    context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
                return answer()

            return call

        traces = type("Traces", (TraceServiceServicer,), {"Export": export(self.traces, ExportTraceServiceResponse)})
        metrics = type(
            "Metrics", (MetricsServiceServicer,), {"Export": export(self.metrics, ExportMetricsServiceResponse)}
        )
        server = grpc.server(ThreadPoolExecutor(4))
        add_TraceServiceServicer_to_server(traces(), server)
        add_MetricsServiceServicer_to_server(metrics(), server)
        self.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self._stop = lambda: server.stop(0).wait()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def content(self) -> bytes:
        return b"".join(request.SerializeToString() for request in (*self.traces, *self.metrics))

    def spans(self) -> dict[str, Any]:
        return {span.name: span for span in self.all_spans()}

    def all_spans(self) -> list[Any]:
        return [span for request in self.traces for resource in request.resource_spans
                for scope in resource.scope_spans for span in scope.spans]  # fmt: skip

    def senders(self) -> list[dict[str, Any]]:
        return [plain(resource.resource.attributes) for request in self.traces for resource in request.resource_spans]

    def gauges(self) -> dict[str, float]:
        return {metric.name: metric.gauge.data_points[-1].as_double for request in self.metrics
                for resource in request.resource_metrics for scope in resource.scope_metrics
                for metric in scope.metrics}  # fmt: skip

    def close(self) -> None:
        self.hung.set()
        self._stop()


def plain(attributes: Any) -> dict[str, Any]:
    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        found = getattr(any_value, kind)
        return [value(item) for item in found.values] if kind == "array_value" else found

    return {item.key: value(item.value) for item in attributes}
