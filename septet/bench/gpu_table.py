"""Septet beside vLLM on one GPU, in one run: a table of ratios, and each side's JSON.

    python -m septet.bench.gpu_table [--shapes 1b,8b] [--vllm-path SITE] [--budget 600] [--out DIR] [--full]

Runs `gpu_workloads` once per side and shape, each in a process of its own, sides in turn. SITE: what vLLM's side has
in front of its PYTHONPATH; without it only Septet runs. `--full` adds W5 without the prefix cache. A run that the
budget (seconds, all in all) does not allow is left out and said so; what a run measured before it was cut counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from septet.bench.host import run_job

__all__ = ["Job", "jobs", "main", "table"]

GOALS = {  # ratio to vLLM, by shape
    "w1_ttft128_ms": {"1b": 1.5, "8b": 1.5},
    "w1_tpot_ms": {"1b": 2.4, "8b": 1.3},
    "w2_b32_tok_s": {"1b": 1.6, "8b": 1.25},
    "w2_b64_tok_s": {"1b": 1.6, "8b": 1.25},
    "w2_b128_tok_s": {"1b": 1.6, "8b": 1.25},
    "w2_b256_tok_s": {"1b": 1.6, "8b": 1.25},
    "w3_out_tok_s": {"1b": 1.6, "8b": 1.25},
    "w4_shared4k_x10_ms": {"1b": 1.2, "8b": 1.2},
    "w5_agents_out_tok_s": {"1b": 1.3, "8b": 1.3},
    "w7_prefill_tok_s": {"1b": 1.0, "8b": 1.0},
    "start_to_first_token_s": {},
}
LEAST_S = 30.0  # a run is not begun with less of the budget left
NO_CACHE = {"enable_prefix_caching": False}


@dataclass(frozen=True)
class Job:
    target: str
    shape: str
    variant: str = ""  # "" or "-nocache"

    @property
    def file(self) -> str:
        return f"{self.target}-{self.shape}{self.variant}.json"

    def command(self, out: Path) -> list[str]:
        command = [sys.executable, "-m", "septet.bench.gpu_workloads", "--target", self.target, "--shape", self.shape]
        command += ["--json", str(out / self.file)]
        return [*command, "--only", "w5", "--options", json.dumps(NO_CACHE)] if self.variant else command


def jobs(shapes: list[str], vllm: bool, full: bool) -> list[Job]:
    """Sides in turn, so that a drift of the machine meets both."""
    found = [Job(target, shape) for shape in shapes for target in ("septet", "vllm") if target == "septet" or vllm]
    return [*found, *(Job("septet", shape, "-nocache") for shape in shapes if full)]


def run(job: Job, out: Path, seconds: float, vllm_path: str) -> str:
    """ "" or what went wrong."""
    env = dict(os.environ)
    root = str(Path(__file__).parents[2])
    if job.target == "vllm":
        env |= {"PYTHONPATH": os.pathsep.join([vllm_path, root]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    with (out / f"{job.file.removesuffix('.json')}.log").open("w") as log:
        try:
            code = run_job(job.command(out), seconds, stdout=log, stderr=log, env=env).returncode
        except subprocess.TimeoutExpired:
            return f"cut after {seconds:.0f} s"
    return "" if code == 0 else f"exit code {code}"


def figures(out: Path, job: Job) -> dict[str, float]:
    path = out / job.file
    found: dict[str, float] = json.loads(path.read_text())["figures"] if path.exists() else {}
    return found


def table(out: Path, shapes: list[str]) -> list[str]:
    """Markdown: ours, vLLM's, the ratio in our favour, the goal, our share of the card's limit."""
    lines = ["| shape | figure | Septet | vLLM | ratio | goal | share of the limit |", "|---|---|---|---|---|---|---|"]
    for shape in shapes:
        ours, theirs = figures(out, Job("septet", shape)), figures(out, Job("vllm", shape))
        limits = _about(out, shape).get("limits", {})
        for name in ours:
            goal = GOALS.get(name, {}).get(shape)
            ratio = _better(name, ours[name], theirs[name]) if name in theirs else None
            share = _better(name, ours[name], limits[name]) if name in limits else None
            cells = [f"{ours[name]:,.4g}", *map(_shown, (theirs.get(name), ratio, goal))]
            cells.append("" if share is None else f"{100 * share:.0f} %")
            lines.append(f"| {shape} | {name} | {' | '.join(cells)} |")
        lines += _within(shape, ours, figures(out, Job("septet", shape, "-nocache")))
    return lines


def _within(shape: str, ours: dict[str, float], no_cache: dict[str, float]) -> list[str]:
    """Ratios between our own figures."""
    pairs = [("w4 shared over unshared", ours.get("w4_unique4k_x10_ms"), ours.get("w4_shared4k_x10_ms"), 5.0)]
    cached, bare = ours.get("w5_agents_out_tok_s"), no_cache.get("w5_agents_out_tok_s")
    pairs.append(("w5 cache over none", cached, bare, 3.0))
    return [f"| {shape} | {name} | | | {a / b:.3g} | {goal:g} | |" for name, a, b, goal in pairs if a and b]


def _about(out: Path, shape: str) -> dict[str, Any]:
    path = out / Job("septet", shape).file
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _better(name: str, ours: float, other: float) -> float:
    return other / ours if name.endswith(("_ms", "_s")) and not name.endswith("tok_s") else ours / other


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--vllm-path", default="", help="what vLLM is imported from")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h100"))
    parser.add_argument("--full", action="store_true", help="W5 without the prefix cache, too")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shapes, end = args.shapes.split(","), time.monotonic() + args.budget
    for job in jobs(shapes, bool(args.vllm_path), args.full):
        left = end - time.monotonic()
        (args.out / job.file).unlink(missing_ok=True)
        began = time.monotonic()
        wrong = run(job, args.out, left, args.vllm_path) if left >= LEAST_S else "left out: no time"
        print(f"{job.file}: {wrong or f'{time.monotonic() - began:.0f} s'}", flush=True)
    lines = table(args.out, shapes)
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
