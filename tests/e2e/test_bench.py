"""`septet bench` from the command line to the report, with the real model behind a server that runs already."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from tests.e2e.serving import Server, command

if TYPE_CHECKING:
    from pathlib import Path


def test_bench_measures_the_real_model(server: Server, tmp_path: Path) -> None:
    words = ["bench", "--url", server.url, "--workload", "single", "--workload", "structured", "--scale", "0.1"]
    done = subprocess.run(
        command(*words, "--rounds", "1", "--price", "1", "--out", str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    single, structured = document["points"]
    assert single["figures"]["answer_tokens"]["median"] == 13, "a tenth of 128, whatever the model would say"
    assert 10 < single["figures"]["prompt_tokens"]["median"] < 60
    assert single["figures"]["tpot_ms"]["median"] > 0
    assert structured["figures"].get("valid_share", {"median": 1.0})["median"] == 1.0
    assert "memory_mib" not in single["figures"], "the server is not ours to look into"
    assert document["limits"] == {}
    assert document["workloads"]["single"]["output"] == 13
    assert document["targets"][0]["version"]
    assert 0 <= single["client"]["busy"] < 1
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert f"{document['points'][0]['title']}" in page
    assert (tmp_path / "report.md").read_text().startswith("# septet bench")
