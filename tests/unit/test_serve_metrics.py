"""Every metric name of vLLM and TGI that has a meaning here: its type, its labels, and figures that a request moves."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from septet.engine.client import InlineClient
from septet.engine.echo import EchoExecutor
from septet.engine.scheduler import Scheduler, SchedulerLimits
from septet.kv.cache import KVCache
from septet.serve.app import Service, Settings, create_app
from tests import fakes

MODEL = {"model_name", "engine"}
Names = dict[str, dict[str, set[str]]]  # type -> name -> labels


def named(labels: set[str], names: str) -> dict[str, set[str]]:
    return dict.fromkeys(names.split(), labels)


VLLM: Names = {
    "gauge": {
        **named(MODEL, "num_requests_running num_requests_waiting kv_cache_usage_perc gpu_cache_usage_perc"),
        "cache_config_info": MODEL | {"block_size", "num_gpu_blocks"},
    },
    "counter": {
        **named(MODEL, "prompt_tokens generation_tokens num_preemptions prefix_cache_queries prefix_cache_hits"),
        "request_success": MODEL | {"finished_reason"},
        "admission_rejections": {"reason"},
    },
    "histogram": {
        **named(MODEL, "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds"),
        **named(MODEL, "request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds"),
        **named(MODEL, "request_inference_time_seconds request_time_per_output_token_seconds request_prompt_tokens"),
        **named(MODEL, "request_generation_tokens request_max_num_generation_tokens request_params_n"),
        **named(MODEL, "request_params_max_tokens iteration_tokens_total"),
    },
}
TGI: Names = {
    "gauge": named(set(), "queue_size batch_current_size batch_current_max_tokens batch_max_total_tokens"),
    "unknown": {
        **named(set(), "request_count request_success"),
        "request_failure": {"err"},
        "batch_inference_count": {"method"},
    },
    "histogram": {
        **named(set(), "request_duration request_validation_duration request_queue_duration request_skipped_tokens"),
        **named(set(), "request_inference_duration request_mean_time_per_token_duration request_input_length"),
        **named(set(), "request_max_new_tokens request_generated_tokens"),
    },
}
HTTP: Names = {
    "counter": {"http_requests": {"handler", "method", "status"}},
    "histogram": {"http_request_duration_seconds": {"handler"}},
}


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """The families of /metrics after four requests, two of them the same, to an engine that runs two at a time."""

    async def go() -> str:
        scheduler = Scheduler(
            SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=200), KVCache(401), 257
        )
        engine = InlineClient(scheduler, EchoExecutor(vocab_size=257), fakes.info(), strict=True)
        app = create_app(Service(fakes.session(engine), Settings()))  # type: ignore[arg-type]
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000") as http:

                async def ask(text: str, **more: Any) -> None:
                    body = {"prompt": text, "max_tokens": 8, "ignore_eos": True} | more
                    assert (await http.post("/v1/completions", json=body)).status_code == 200

                await ask("a" * 40)
                await asyncio.gather(ask("a" * 40), ask("b" * 60), ask("c" * 60, n=2))
                return (await http.get("/metrics")).text
        finally:
            await engine.close()

    text = asyncio.run(go())
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.mark.parametrize(("prefix", "names"), [("vllm:", VLLM), ("tgi_", TGI), ("", HTTP)], ids=["vllm", "tgi", "http"])
def test_names_have_their_types_and_labels(told: dict[str, Any], prefix: str, names: Names) -> None:
    for kind, labels in names.items():
        for name, wanted in labels.items():
            family = told[prefix + name]
            assert family.type == kind, name
            for sample in family.samples:
                assert set(sample.labels) - {"le"} == wanted, name
            if kind == "counter":
                assert all(sample.name == f"{prefix}{name}_total" for sample in family.samples)


def value(told: dict[str, Any], name: str, part: str) -> float:
    return next(sample.value for sample in told[name].samples if sample.name == name + part)


def test_times_of_every_request_are_there_and_add_up(told: dict[str, Any]) -> None:
    for name in ("queue_time", "prefill_time", "inference_time", "decode_time"):
        assert value(told, f"vllm:request_{name}_seconds", "_count") == 5, name
    assert value(told, "tgi_request_queue_duration", "_count") == 5
    assert value(told, "tgi_request_skipped_tokens", "_sum") >= 39, "the second of two equal prompts"
    queue, inference = (value(told, f"vllm:request_{n}_time_seconds", "_sum") for n in ("queue", "inference"))
    assert queue > 0
    parts = sum(value(told, f"vllm:request_{n}_time_seconds", "_sum") for n in ("prefill", "decode"))
    assert inference == pytest.approx(parts)
    assert value(told, "vllm:request_max_num_generation_tokens", "_sum") == 4 * 8, "once for each request"


def test_steps_are_counted_by_their_tokens(told: dict[str, Any]) -> None:
    steps = {s.labels["le"]: s.value for s in told["vllm:iteration_tokens_total"].samples if s.name.endswith("_bucket")}
    assert steps["16.0"] == steps["+Inf"] > steps["1.0"] > 0, "no step is larger than its budget"
    computed = told["septet:computed_tokens"].samples[0].value
    assert value(told, "vllm:iteration_tokens_total", "_sum") == computed
    methods = {s.labels["method"]: s.value for s in told["tgi_batch_inference_count"].samples}
    assert sum(methods.values()) == steps["+Inf"]
    assert min(methods.values()) > 0
