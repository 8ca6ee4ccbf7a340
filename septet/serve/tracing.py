"""OpenTelemetry traces, one span for each request, where `septet[otel]` is installed and an endpoint is named.

Spans carry the field's names (gen_ai.*, http.*); an incoming `traceparent` is continued. Exporting is the SDK's, in a
thread with a bounded queue. Knows no route's fields and no text of a prompt or an answer.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import septet
from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from starlette.types import Scope

    from septet.serve.context import Context

__all__ = ["Tracing"]

CLOSE_WAIT_S = 3.0


class Tracing:
    """`exporter`: of the SDK; tests give their own. Made by `to`."""

    def __init__(self, exporter: Any, service_name: str = "septet") -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise _missing() from None
        resource = Resource.create({"service.name": service_name, "service.version": septet.__version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("septet.serve", septet.__version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Spans go to this OTLP/HTTP endpoint, http://HOST:4318/v1/traces say."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise _missing() from None
        return cls(OTLPSpanExporter(endpoint=endpoint))

    def begin(self, scope: Scope) -> Any:
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(carrier) if carrier else None
        return self._tracer.start_span("request", context=parent, kind=SpanKind.SERVER)

    def end(self, span: Any, context: Context, scope: Scope, status: int) -> None:
        from opentelemetry.trace import Status, StatusCode

        span.update_name(f"{scope['method'][:16]} {context.route or 'unknown'}")
        facts = {
            "http.request.method": scope["method"][:16],
            "http.route": context.route,
            "http.response.status_code": status,
            "septet.request_id": context.id,
            "gen_ai.request.model": context.model,
            "gen_ai.usage.input_tokens": context.prompt_tokens,
            "gen_ai.usage.output_tokens": context.output_tokens,
            "gen_ai.usage.cached_tokens": context.cached_tokens,
            "gen_ai.response.finish_reasons": [context.finish] if context.finish else [],
            "gen_ai.server.time_to_first_token": context.ttft_s,
        }
        span.set_attributes({name: value for name, value in facts.items() if value not in (None, "", [])})
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left, for a moment at most: a collector that does not answer must not hold up the end."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(CLOSE_WAIT_S)


def _missing() -> InvalidRequest:
    return InvalidRequest(
        "traces need OpenTelemetry: pip install 'septet[otel]', or leave out --otlp-traces-endpoint",
        param="otlp_traces_endpoint",
    )
