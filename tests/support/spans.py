"""An OpenTelemetry collector over HTTP, which keeps the spans that it is sent."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Attributes = dict[str, Any]


class SpanCollector:
    """Listens on a free port.

    Attributes:
        endpoint: where spans are sent to.
        environment: what has an exporter speak HTTP, and send soon.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[str, Attributes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer._take(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self.environment = {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }

    def _take(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self._spans += [
                    (span.name, {a.key: _value(a.value) for a in span.attributes})
                    for span in scope.spans
                ]

    def clear(self) -> None:
        self._spans.clear()

    def wait_for(self, count: int, prompt_tokens: int, seconds: float = 20) -> list[Attributes]:
        """The attributes of the spans of requests with so many tokens, as soon as there are that many.

        Of requests that others made before, spans may come at any time.
        """
        deadline = time.monotonic() + seconds
        while len(found := self._requests(prompt_tokens)) < count:
            assert time.monotonic() < deadline, self._spans
            time.sleep(0.1)
        return found

    def _requests(self, prompt_tokens: int) -> list[Attributes]:
        return [
            held
            for name, held in self._spans
            if name == "llm_request" and held["gen_ai.usage.prompt_tokens"] == prompt_tokens
        ]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))
