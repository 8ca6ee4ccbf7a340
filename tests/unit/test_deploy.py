"""What is in deploy/ speaks of things that exist: metrics of the dashboard, flags of unit, image and compose file."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from septet.serve.app import Service, Settings
from septet.serve.keys import Key, Keys, digest_of
from septet.serve.metrics import Metrics
from tests.fakes import FakeClient, session

DEPLOY = Path(__file__).parents[2] / "deploy"
WORDS = {"sum", "rate", "by", "le", "histogram_quantile", "model_name", "label_values"}


def names() -> set[str]:
    """Every sample's name that a server with keys and traffic shows."""
    service = Service(session(FakeClient()), Settings(), Keys([Key(name="a", digest=digest_of("x" * 20))]))
    asyncio.run(service.refresh())
    service.metrics.key_used("a", 1, 1)
    service.metrics.answered("/", "GET", 200)
    return set(re.findall(r"^([a-z_:0-9]+)[{ ]", service.metrics.render().decode(), re.MULTILINE))


def test_every_query_of_the_dashboard_names_a_metric_that_exists() -> None:
    board = json.loads((DEPLOY / "grafana/septet.json").read_text())
    known, asked = names(), set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            expression = re.sub(r"\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)", "", target["expr"])
            asked |= set(re.findall(r"\b[a-z_][a-z_:0-9]+", expression)) - WORDS
    asked.add(re.search(r"label_values\(([^,]+),", json.dumps(board["templating"])).group(1))  # type: ignore[union-attr]
    assert len(asked) > 20
    assert asked <= known, asked - known


@pytest.mark.parametrize(
    "name",
    [
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:cache_config_info",
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
        "vllm:num_preemptions_total", "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
        "vllm:admission_rejections_total", "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_sum", "vllm:e2e_request_latency_seconds_count",
        "vllm:request_time_per_output_token_seconds_bucket", "vllm:request_decode_time_seconds_bucket",
        "vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket", "vllm:request_params_n_bucket",
        "tgi_queue_size", "tgi_batch_current_size", "tgi_batch_current_max_tokens", "tgi_request_count",
        "tgi_request_success", "tgi_request_duration_bucket", "tgi_request_mean_time_per_token_duration_bucket",
        "tgi_request_input_length_bucket", "tgi_request_generated_tokens_bucket", "tgi_request_max_new_tokens_bucket",
        "http_request_duration_seconds_bucket",
    ],
)  # fmt: skip
def test_the_names_that_dashboards_and_routers_of_others_read(name: str) -> None:
    assert name in names()


def flags() -> set[str]:
    from septet.cli.serve import serve

    return {flag for parameter in serve.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def used(words: list[Any]) -> set[str]:
    return {str(word).split("=")[0] for word in words if str(word).startswith("--")}


def test_units_images_and_compose_files_use_flags_that_exist() -> None:
    unit = (DEPLOY / "systemd/septet.service").read_text()
    start = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert start is not None
    assert used(shlex.split(start[1])) <= flags()
    image = (DEPLOY / "docker/Dockerfile").read_text()
    entry = re.search(r"^ENTRYPOINT (.*)$", image, re.MULTILINE)
    assert entry is not None
    assert used(json.loads(entry[1])) <= flags()
    compose = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())
    assert used(compose["services"]["septet"]["command"]) <= flags()
    assert re.search(r"^USER septet$", image, re.MULTILINE), "not as root"
    stop = re.search(r"--shutdown-timeout (\d+)", start[1])
    kill = re.search(r"^TimeoutStopSec=(\d+)", unit, re.MULTILINE)
    assert stop is not None
    assert kill is not None
    assert int(stop[1]) < int(kill[1]), "systemd must not cut a drain"


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "docker/Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_the_image_is_built_of_what_is_there_and_pinned_and_serves_as_nobody_special() -> None:
    told = instructions()
    root = DEPLOY.parent
    assert not {"ADD", "MAINTAINER", "ONBUILD"} & {name for name, _ in told}
    for name, rest in told:
        if name == "FROM":
            assert re.fullmatch(r"[a-z]+:(?!latest)[\w.-]+( AS \w+)?", rest), rest
        elif name == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            assert all((root / source).exists() for source in sources), rest
        elif name == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest
        elif name in ("ENTRYPOINT", "CMD"):
            assert json.loads(rest), "the exec form: signals reach the server"
    last = max(i for i, (name, _) in enumerate(told) if name == "FROM")
    user = next(i for i, (name, _) in enumerate(told) if name == "USER")
    assert last < user
    assert not any(name == "RUN" and "pip install" in rest for name, rest in told[last:]), "no compiler in the image"


def test_probes_of_the_image_ask_a_public_route_on_the_port_it_serves() -> None:
    from septet.serve.operations import OPERATIONS

    told = dict(instructions())
    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", told["HEALTHCHECK"])
    assert asked is not None
    assert asked[1] == told["EXPOSE"] == str(Settings().port)
    assert asked[2] in OPERATIONS.public


def test_the_compose_file_mounts_what_is_there_and_publishes_to_loopback_alone() -> None:
    file = DEPLOY / "docker/compose.yaml"
    compose = yaml.safe_load(file.read_text())
    for name, service in compose["services"].items():
        assert "build" in service or re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), name
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert set(service.get("depends_on", ())) <= set(compose["services"])
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert source in compose["volumes"] or (file.parent / source).exists(), mount
        for config in service.get("configs", ()):
            assert config["source"] in compose["configs"]
    septet = compose["services"]["septet"]
    assert (file.parent / septet["build"]["context"] / septet["build"]["dockerfile"]).is_file()
    assert (septet["read_only"], septet["cap_drop"]) == (True, ["ALL"])
    scrape = yaml.safe_load(compose["configs"]["prometheus"]["content"])
    [target] = scrape["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in septet["command"], "or the server refuses this Host"


def test_grafana_finds_its_dashboard_and_its_data() -> None:
    board = json.loads((DEPLOY / "grafana/septet.json").read_text())
    [source] = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    [provider] = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/septet.yaml").read_text())["providers"]
    compose = (DEPLOY / "docker/compose.yaml").read_text()
    assert source["url"] == "http://prometheus:9090"
    assert f":{provider['options']['path']}/septet.json:ro" in compose
    places = [tuple(panel["gridPos"][k] for k in "xywh") for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(x + w <= 24 for x, _, w, _ in places)
    assert len({panel["id"] for panel in board["panels"]}) == len(places)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "septet.service"
    text = (DEPLOY / "systemd/septet.service").read_text()
    unit.write_text(text.replace("/opt/septet/bin/septet", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if "septet.service" in line]
    assert told == []


def test_labels_tell_models_apart() -> None:
    from septet.request import SamplingParams

    metrics = Metrics()
    for model in ("one", "two"):
        metrics.track(model, SamplingParams(), [3])
    text = metrics.render().decode()
    for model in ("one", "two"):
        assert f'vllm:request_prompt_tokens_count{{engine="0",model_name="{model}"}} 1.0' in text


def test_every_test_that_the_security_page_names_exists() -> None:
    root = Path(__file__).parents[2]
    named = re.findall(r"(tests/[a-z_0-9/]+\.py)(?:::(\w+))?", (root / "docs/security.md").read_text())
    assert len(named) > 50
    for file, test in named:
        text = (root / file).read_text()
        assert not test or re.search(rf"^(?:async )?def {test}\(", text, re.MULTILINE), f"{file}::{test}"
