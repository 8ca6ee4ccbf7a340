"""The server against its own OpenAPI document: requests that follow it and requests that don't; none gives a 500."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis.generation import GenerationMode

if TYPE_CHECKING:
    from collections.abc import Iterator

LEFT_OUT = ("/api/pull", "/api/create", "/api/blobs")  # they fetch, or keep what they are given
SERVER_ERRORS = (500, 502, 504, 505, 599)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = Path(__file__).parents[2]
    env = {**os.environ, "SEPTET_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join((str(root), env.get("PYTHONPATH", "")))
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with log.open("w") as stderr:
        options = json.dumps({"model": "echo:257:0", "settings": {"drain_s": 1}})
        command = [sys.executable, "-m", "tests.echo_server", options]
        server = subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert server.stdout is not None
        port = server.stdout.readline().partition(" ")[0].strip()
        assert port, log.read_text()
        yield f"http://127.0.0.1:{port}"
        assert requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        server.terminate()
        assert server.wait(20) == 0, log.read_text()
        server.stdout.close()


def operations(url: str) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return [operation for operation in found if not operation.path.startswith(LEFT_OUT)]


def exercise(operation: Any, url: str, http: requests.Session, n: int, **settings: Any) -> None:
    with_body = bool(list(operation.body))
    for mode in (GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if with_body else [])):

        @hypothesis.settings(
            max_examples=n,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=(hypothesis.Phase.generate,),
            **settings,
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            case.headers = None
            response = case.call(base_url=url, session=http, timeout=20)
            assert response.status_code not in SERVER_ERRORS, f"{case.as_curl_command()}\n{response.text[:500]}"

        try:
            ask()
        except (hypothesis.errors.Unsatisfiable, schemathesis.errors.InvalidSchema):
            continue  # nothing can be wrong about a request without body and parameters


def run(url: str, tag: str, n: int, **settings: Any) -> int:
    """n requests of each mode to every operation whose tag begins so -> how many operations there are."""
    with requests.Session() as http, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [operation for operation in operations(url) if operation.tags[0].startswith(tag)]
        for operation in found:
            exercise(operation, url, http, n, **settings)
    return len(found)


def test_a_few_requests_to_openais_routes(url: str) -> None:
    assert run(url, "openai", 2, derandomize=True) > 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_requests_to_every_route(url: str) -> None:
    assert run(url, "", 30) > 40
