"""Prometheus metrics in vLLM's names, so that existing dashboards and routers read Septet unchanged.

Gauges and counters of the engine come from one `EngineStats` per scrape; histograms are observed per choice while its
events pass. What vLLM has no name for is under `septet:`. Knows nothing of JSON or routes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from septet.engine.messages import EngineStats
from septet.session.events import Event, Finished, TextDelta

if TYPE_CHECKING:
    from collections.abc import Iterator

    from septet.request import SamplingParams

__all__ = ["Metrics", "Track"]

_LABELS = ("model_name", "engine")
_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_TOKEN_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
    40,
)
_COUNTS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_SMALL = (1, 2, 5, 10, 20, 50, 100)

_GAUGES = (
    ("vllm:num_requests_running", "Requests in the running batch", "running"),
    ("vllm:num_requests_waiting", "Requests waiting for admission", "waiting"),
    ("septet:kv_slots", "KV slots (tokens) of the pool", "slots_total"),
    ("septet:kv_slots_free", "KV slots that hold nothing", "slots_free"),
    ("septet:kv_slots_cached", "KV slots held by the prefix cache alone", "slots_cached"),
    ("septet:kv_slots_leased", "KV slots held for running requests", "slots_leased"),
    ("septet:kv_slots_used", "Leased KV slots whose KV is computed", "slots_used"),
    ("septet:kv_waste_ratio", "(leased - used) / leased, averaged over steps", "kv_waste"),
    ("septet:kv_waste_ratio_max", "The worst step's waste", "kv_waste_max"),
    ("septet:last_step_rows", "Requests in the last step", "last_step_rows"),
    ("septet:last_step_tokens", "Tokens in the last step", "last_step_tokens"),
    ("septet:last_step_prefill_tokens", "Prompt tokens in the last step", "last_step_prefill_tokens"),
)
_COUNTERS = (
    ("vllm:prompt_tokens", "Prompt tokens of admitted requests, cached ones included", "prompt_tokens"),
    ("vllm:generation_tokens", "Tokens generated", "generated_tokens"),
    ("vllm:num_preemptions", "Requests put back to make room", "preemptions"),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", "prompt_tokens"),
    ("vllm:prefix_cache_hits", "Prompt tokens found there", "cached_tokens"),
    ("septet:computed_tokens", "Tokens that went through the model", "computed_tokens"),
    ("septet:steps", "Engine steps", "steps"),
    ("septet:mixed_steps", "Steps with prefill and decode together", "mixed_steps"),
    ("septet:failed_steps", "Engine steps that raised; their requests ended with an error", "failed_steps"),
    ("septet:audit_failures", "Audits that found KV slots or rows lost", "audit_failures"),
    ("septet:step_seconds", "Wall time in steps", "step_s"),
    ("septet:host_seconds", "Of that, scheduling and commit on the host", "host_s"),
)


class _Engine(Collector):
    """The engine's own numbers, as of the last stats message."""

    def __init__(self, labels: tuple[str, str]) -> None:
        self.labels = labels
        self.stats = EngineStats()
        self.up = True

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        for name, text, attribute in _GAUGES:
            yield self._gauge(name, text, getattr(stats, attribute))
        total = stats.slots_total
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "KV slots leased, 1 = all", stats.slots_leased / total if total else 0
        )
        yield self._gauge("septet:engine_up", "1 while the engine process lives", float(self.up))
        for name, text, attribute in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(self.labels, getattr(stats, attribute))
            yield counter

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=_LABELS)
        gauge.add_metric(self.labels, value)
        return gauge


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        labels = (model_name, "0")
        self._engine = _Engine(labels)
        self.registry.register(self._engine)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _LABELS, buckets=buckets, registry=self.registry).labels(*labels)

        self.ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _SECONDS)
        self.itl = histogram("vllm:inter_token_latency_seconds", "Between tokens of a choice", _TOKEN_SECONDS)
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", _SECONDS)
        self.prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens per request", _COUNTS)
        self.output = histogram("vllm:request_generation_tokens", "Output tokens per choice", _COUNTS)
        self.n = histogram("vllm:request_params_n", "n of requests", _SMALL)
        self.max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens of requests", _COUNTS)
        success = Counter(
            "vllm:request_success", "Choices finished", (*_LABELS, "finished_reason"), registry=self.registry
        )
        self._finished = {reason: success.labels(*labels, reason) for reason in ("stop", "length", "abort", "error")}
        self._http = Counter("http_requests", "HTTP requests", ("handler", "method", "status"), registry=self.registry)

    def track(self, params: SamplingParams, prompt_tokens: list[int]) -> Track:
        for count in prompt_tokens:
            self.prompt.observe(count)
            self.n.observe(params.n)
            if params.max_tokens is not None:
                self.max_tokens.observe(params.max_tokens)
        return Track(self, len(prompt_tokens) * params.n, params.n)

    def answered(self, handler: str, method: str, status: int) -> None:
        """Count one HTTP answer; `handler` is a route's pattern, so that labels are bounded."""
        known = method if method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"
        self._http.labels(handler, known, str(status)).inc()

    def ended(self, reason: str) -> None:
        self._finished.get(reason, self._finished["error"]).inc()

    def render(self, stats: EngineStats | None, up: bool) -> bytes:
        """The exposition text; `stats` None keeps the last known."""
        if stats is not None:
            self._engine.stats = stats
        self._engine.up = up
        return generate_latest(self.registry)


class Track:
    """Times of the choices of one call."""

    def __init__(self, metrics: Metrics, n_choices: int, n: int) -> None:
        self._metrics = metrics
        self._n = n
        self._started = time.monotonic()
        self._last: dict[int, float] = {}
        self._open = n_choices

    def saw(self, number: int, event: Event) -> None:
        """Event of prompt `number` passes."""
        index = number * self._n + event.index
        now = time.monotonic()
        if isinstance(event, TextDelta):
            last = self._last.get(index)
            if last is None:
                self._metrics.ttft.observe(now - self._started)
            else:
                self._metrics.itl.observe(now - last)
            self._last[index] = now
        elif isinstance(event, Finished):
            self._open -= 1
            self._metrics.e2e.observe(now - self._started)
            self._metrics.output.observe(event.usage.completion_tokens)
            self._metrics.ended(str(event.reason))

    def aborted(self) -> None:
        """The client left: what is open counts as aborted."""
        self._close("abort")

    def failed(self) -> None:
        self._close("error")

    def _close(self, reason: str) -> None:
        for _ in range(self._open):
            self._metrics.ended(reason)
        self._open = 0
