"""Prometheus metrics in vLLM's names and TGI's, so that existing dashboards and routers read Septet unchanged.

Gauges and counters of an engine come from one `EngineStats` per scrape; histograms are observed per choice while its
events pass. Everything of a model has its name as a label. What vLLM has no name for is under `septet:`. Knows nothing
of JSON or routes.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from septet.engine.messages import STEP_TOKENS
from septet.serve.errors import DeadlineExceeded
from septet.session.events import Event, Finished, TextDelta

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from septet.engine.messages import EngineInfo, EngineStats
    from septet.request import SamplingParams

__all__ = ["Metrics", "Track"]

RECENT = 256  # latencies kept for the scope
REASONS = ("stop", "length", "abort", "error", "timeout")
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH")

_LABELS = ("model_name", "engine")
_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
_HTTP_SECONDS = (0.005, 0.025, 0.1, 0.5, 2.5, 10, 60, 600)  # of every route: few, since there are many routes
_TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 40
)  # fmt: skip
_COUNTS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_SMALL = (1, 2, 5, 10, 20, 50, 100)

_GAUGES = (
    ("vllm:num_requests_running", "Requests in the running batch", "running"),
    ("vllm:num_requests_waiting", "Requests waiting for admission", "waiting"),
    ("septet:kv_slots", "KV slots (tokens) of the pool", "slots_total"),
    ("septet:kv_slots_free", "KV slots that hold nothing", "slots_free"),
    ("septet:kv_slots_cached", "KV slots held by the prefix cache alone", "slots_cached"),
    ("septet:kv_slots_leased", "KV slots held for running requests", "slots_leased"),
    ("septet:kv_slots_pinned", "KV slots held by pins (cache_control)", "slots_pinned"),
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


class _Engines(Collector):
    """The engines' own numbers, as of the last stats messages, and what the server counts without a histogram."""

    def __init__(self) -> None:
        self.stats: dict[str, EngineStats] = {}  # by model
        self.infos: dict[str, EngineInfo] = {}
        self.up = True
        self.refused: Mapping[str, int] = {}
        self.restarts = 0
        self.dropped_log_lines = 0

    def collect(self) -> Iterator[Metric]:
        for name, text, attribute in _GAUGES:
            yield self._gauge(name, text, {m: getattr(s, attribute) for m, s in self.stats.items()})
        usage = {m: s.slots_leased / s.slots_total if s.slots_total else 0.0 for m, s in self.stats.items()}
        yield self._gauge("vllm:kv_cache_usage_perc", "KV slots leased, 1 = all", usage)
        yield self._gauge("vllm:gpu_cache_usage_perc", "The same under its older name", usage)
        for name, text, attribute in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            for model, stats in self.stats.items():
                counter.add_metric((model, "0"), getattr(stats, attribute))
            yield counter
        yield self._step_tokens()
        yield self._cache_config()
        yield from self._tgi()
        yield from self._server()

    def _gauge(self, name: str, text: str, values: Mapping[str, float]) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=_LABELS)
        for model, value in values.items():
            gauge.add_metric((model, "0"), value)
        return gauge

    def _step_tokens(self) -> Metric:
        steps = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens per engine step", labels=_LABELS)
        bounds = [*map(float, STEP_TOKENS), float("inf")]
        for model, stats in self.stats.items():
            counts = accumulate(stats.step_tokens or [0] * len(bounds))
            buckets = [(floatToGoString(bound), n) for bound, n in zip(bounds, counts, strict=True)]
            steps.add_metric((model, "0"), buckets, stats.computed_tokens)
        return steps

    def _cache_config(self) -> Metric:
        """What llm-d's scheduler reads beside the gauges: the pool's size in blocks of one token."""
        labels = (*_LABELS, "block_size", "num_gpu_blocks")
        gauge = GaugeMetricFamily("vllm:cache_config_info", "The KV pool", labels=labels)
        for model, info in self.infos.items():
            gauge.add_metric((model, "0", "1", str(info.num_kv_slots)), 1)
        return gauge

    def _tgi(self) -> Iterator[Metric]:
        """TGI serves one model and has no label for it: sums."""
        each = self.stats.values()
        for name, text, value in (
            ("tgi_queue_size", "Requests waiting", sum(s.waiting for s in each)),
            ("tgi_batch_current_size", "Requests in the running batch", sum(s.running for s in each)),
            ("tgi_batch_current_max_tokens", "KV slots held for them", sum(s.slots_leased for s in each)),
            ("tgi_batch_max_total_tokens", "KV slots there are", sum(s.slots_total for s in each)),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        steps = Metric("tgi_batch_inference_count", "Engine steps, those with prompt tokens apart", "unknown")
        prefill = sum(s.prefill_steps for s in each)
        steps.add_sample("tgi_batch_inference_count", {"method": "prefill"}, prefill)
        steps.add_sample("tgi_batch_inference_count", {"method": "decode"}, sum(s.steps for s in each) - prefill)
        yield steps

    def _server(self) -> Iterator[Metric]:
        yield self._gauge(
            "septet:engine_up", "1 while requests can be served", dict.fromkeys(self.infos, float(self.up))
        )
        for name in ("vllm:admission_rejections", "septet:refused"):
            refused = CounterMetricFamily(name, "Calls refused before an engine heard of them", labels=("reason",))
            for reason, n in self.refused.items():
                refused.add_metric((reason,), n)
            yield refused
        yield CounterMetricFamily("septet:engine_restarts", "Engines started again after a death", value=self.restarts)
        text = "Access-log lines that could not be written"
        yield CounterMetricFamily("septet:dropped_log_lines", text, value=self.dropped_log_lines)


class _Plain(Collector):
    """TGI's counters end without the `_total` that the client library insists on."""

    def __init__(self) -> None:
        self.count = 0
        self.success = 0
        self.failure: dict[str, int] = {}

    def collect(self) -> Iterator[Metric]:
        for name, text, value in (
            ("tgi_request_count", "Choices asked for", self.count),
            ("tgi_request_success", "Choices finished", self.success),
        ):
            metric = Metric(name, text, "unknown")
            metric.add_sample(name, {}, value)
            yield metric
        failed = Metric("tgi_request_failure", "Choices that failed or were aborted", "unknown")
        for err, n in self.failure.items():
            failed.add_sample("tgi_request_failure", {"err": err}, n)
        yield failed


class _Model:
    """The histograms of one model, and its latest latencies for the scope."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        kinds, labels = metrics.kinds, (model, "0")
        self.ttft, self.itl, self.e2e, self.decode, self.tpot = (
            kinds[name].labels(*labels) for name in ("ttft", "itl", "e2e", "decode", "tpot")
        )
        self.queue, self.prefill, self.inference = (
            kinds[name].labels(*labels) for name in ("queue", "prefill", "inference")
        )
        self.prompt, self.output, self.most, self.n, self.max_tokens = (
            kinds[name].labels(*labels) for name in ("prompt", "output", "most", "n", "max_tokens")
        )
        self.finished = {reason: metrics.success.labels(*labels, reason) for reason in REASONS}
        self.recent_ttft: deque[tuple[float, float]] = deque(maxlen=RECENT)  # (monotonic time, seconds)
        self.recent_tpot: deque[tuple[float, float]] = deque(maxlen=RECENT)


_HISTOGRAMS = (
    ("ttft", "vllm:time_to_first_token_seconds", "Arrival to first token", _SECONDS),
    ("itl", "vllm:inter_token_latency_seconds", "Between tokens of a choice", _TOKEN_SECONDS),
    ("e2e", "vllm:e2e_request_latency_seconds", "Arrival to last token", _SECONDS),
    ("queue", "vllm:request_queue_time_seconds", "From sending to the first step with the request", _SECONDS),
    ("prefill", "vllm:request_prefill_time_seconds", "From there to the first token", _SECONDS),
    ("inference", "vllm:request_inference_time_seconds", "First step to last token", _SECONDS),
    ("decode", "vllm:request_decode_time_seconds", "First to last token", _SECONDS),
    ("tpot", "vllm:request_time_per_output_token_seconds", "Of that, per token after the first", _TOKEN_SECONDS),
    ("prompt", "vllm:request_prompt_tokens", "Prompt tokens per request", _COUNTS),
    ("output", "vllm:request_generation_tokens", "Output tokens per choice", _COUNTS),
    ("most", "vllm:request_max_num_generation_tokens", "Output tokens of a request's longest choice", _COUNTS),
    ("n", "vllm:request_params_n", "n of requests", _SMALL),
    ("max_tokens", "vllm:request_params_max_tokens", "max_tokens of requests", _COUNTS),
)
_TGI_HISTOGRAMS = (
    ("duration", "tgi_request_duration", "Arrival to last token, seconds", _SECONDS),
    ("validation", "tgi_request_validation_duration", "Arrival to the engine's queue, seconds", _SECONDS),
    ("queue", "tgi_request_queue_duration", "Seconds in the engine's queue", _SECONDS),
    ("inference", "tgi_request_inference_duration", "First step to last token, seconds", _SECONDS),
    ("skipped", "tgi_request_skipped_tokens", "Prompt tokens out of the prefix cache", _COUNTS),
    ("per_token", "tgi_request_mean_time_per_token_duration", "Seconds per token after the first", _TOKEN_SECONDS),
    ("input", "tgi_request_input_length", "Prompt tokens", _COUNTS),
    ("generated", "tgi_request_generated_tokens", "Output tokens", _COUNTS),
    ("max_new", "tgi_request_max_new_tokens", "max_new_tokens of requests", _COUNTS),
)


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, models: Sequence[str] = ()) -> None:
        disable_created_metrics()  # a line more for each counter, which nobody reads
        registry = self.registry = CollectorRegistry()
        self.engines, self.plain = _Engines(), _Plain()
        registry.register(self.engines)
        registry.register(self.plain)
        self.kinds = {
            k: Histogram(name, text, _LABELS, buckets=b, registry=registry) for k, name, text, b in _HISTOGRAMS
        }
        self.tgi = {k: Histogram(name, text, buckets=b, registry=registry) for k, name, text, b in _TGI_HISTOGRAMS}
        self.success = Counter(
            "vllm:request_success", "Choices finished", (*_LABELS, "finished_reason"), registry=registry
        )
        self._http = Counter("http_requests", "HTTP requests", ("handler", "method", "status"), registry=registry)
        self._http_seconds = Histogram(
            "http_request_duration_seconds", "HTTP requests", ("handler",), buckets=_HTTP_SECONDS, registry=registry
        )
        self._key_tokens = Counter("septet:key_tokens", "Tokens by API key", ("key", "kind"), registry=registry)
        self._models: dict[str, _Model] = {}
        for model in models:
            self.of(model)

    def of(self, model: str) -> _Model:
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = _Model(self, model)
        return found

    def track(
        self, model: str, params: SamplingParams, prompt_tokens: Sequence[int], began: float | None = None
    ) -> Track:
        """began: when the call arrived, of the monotonic clock."""
        kept = self.of(model)
        for count in prompt_tokens:
            if began is not None:
                self.tgi["validation"].observe(time.monotonic() - began)
            kept.prompt.observe(count)
            kept.n.observe(params.n)
            self.tgi["input"].observe(count)
            if params.max_tokens is not None:
                kept.max_tokens.observe(params.max_tokens)
                self.tgi["max_new"].observe(params.max_tokens)
        self.plain.count += len(prompt_tokens) * params.n
        return Track(self, kept, len(prompt_tokens) * params.n, params.n)

    def answered(self, handler: str, method: str, status: int, seconds: float = 0.0) -> None:
        """Count one HTTP answer; `handler` is a route's pattern, so that labels are bounded."""
        self._http.labels(handler, method if method in METHODS else "other", str(status)).inc()
        self._http_seconds.labels(handler).observe(seconds)

    def key_used(self, key: str, prompt: int, output: int) -> None:
        self._key_tokens.labels(key, "prompt").inc(prompt)
        self._key_tokens.labels(key, "output").inc(output)

    def render(self) -> bytes:
        """The exposition text; `engines` keeps the last known figures."""
        return generate_latest(self.registry)


class Track:
    """Times of the choices of one call."""

    def __init__(self, metrics: Metrics, model: _Model, n_choices: int, n: int) -> None:
        self._metrics = metrics
        self._model = model
        self._n = n
        self._started = time.monotonic()
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._ended: dict[int, tuple[int, int]] = {}  # prompts: (choices that ended, tokens of the longest)
        self._open = n_choices

    def saw(self, number: int, event: Event) -> None:
        """Event of prompt `number` passes."""
        index = number * self._n + event.index
        now = time.monotonic()
        if isinstance(event, TextDelta):
            last = self._last.get(index)
            if last is None:
                self._first[index] = now
                self._model.ttft.observe(now - self._started)
                self._model.recent_ttft.append((now, now - self._started))
            else:
                self._model.itl.observe(now - last)
            self._last[index] = now
        elif isinstance(event, Finished):
            self._open -= 1
            self._finish(index, now, event)
            n, most = self._ended.get(number, (0, 0))
            n, most = self._ended[number] = n + 1, max(most, event.usage.completion_tokens)
            if n == self._n:
                self._model.most.observe(most)

    def _finish(self, index: int, now: float, event: Finished) -> None:
        model, tgi, n_tokens = self._model, self._metrics.tgi, event.usage.completion_tokens
        model.e2e.observe(now - self._started)
        tgi["duration"].observe(now - self._started)
        model.output.observe(n_tokens)
        tgi["generated"].observe(n_tokens)
        decode = self._last.get(index, now) - self._first.get(index, now)
        model.decode.observe(decode)
        if event.waited_s is not None:
            inference = event.prefill_s + decode
            model.queue.observe(event.waited_s)
            model.prefill.observe(event.prefill_s)
            model.inference.observe(inference)
            tgi["queue"].observe(event.waited_s)
            tgi["inference"].observe(inference)
            tgi["skipped"].observe(event.usage.cached_tokens)
        if n_tokens > 1:
            model.tpot.observe(decode / (n_tokens - 1))
            model.recent_tpot.append((now, decode / (n_tokens - 1)))
            tgi["per_token"].observe(decode / (n_tokens - 1))
        reason = str(event.reason)
        model.finished.get(reason, model.finished["error"]).inc()
        self._metrics.plain.success += 1

    def aborted(self) -> None:
        """The client left: what is open counts as aborted."""
        self._close("abort", "incomplete_generation")

    def failed(self, error: BaseException) -> None:
        timeout = isinstance(error, DeadlineExceeded)
        self._close("timeout" if timeout else "error", "timeout" if timeout else "generation")

    def _close(self, reason: str, err: str) -> None:
        if self._open:
            self._model.finished[reason].inc(self._open)
            self._metrics.plain.failure[err] = self._metrics.plain.failure.get(err, 0) + self._open
        self._open = 0
