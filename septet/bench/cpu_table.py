"""`make bench-cpu`: Septet beside llama.cpp in one run, with a bandwidth probe between; a table and JSON.

    python -m septet.bench.cpu_table --peer-python PEER/bin/python [--rounds 3] [--models smollm2 ...] [--json PATH]

Each round runs both sides on each file, alternating who goes first, each in a process of its own; the table shows
medians over rounds. The share of the limit is bytes of weights read per second in one stream over the probe beside it.
Files in other block types are made from the catalogue's by llama.cpp's quantiser (speed tests only).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

FIGURES = {"tg128": "one stream", "pp512": "prefill 512", "b8": "8 streams", "b32": "32 streams"}
MODELS = {
    "smollm2 Q4_1": ("smollm2", None),
    "smollm2 Q4_0": ("smollm2", "Q4_0"),
    "smollm2 Q8_0": ("smollm2", "Q8_0"),
    "gemma3:270m Q4_K_M": ("gemma3:270m", None),
}
PEER = Path(__file__).with_name("cpu_llama_cpp.py")


@dataclass
class Entry:
    """One file: figures of each side, one value per round."""

    n_bytes: int
    septet: dict[str, list[float]] = field(default_factory=dict)
    llama_cpp: dict[str, list[float]] = field(default_factory=dict)
    probe_gb_s: list[float] = field(default_factory=list)

    def medians(self, side: dict[str, list[float]]) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in side.items()}


def run_json(command: list[str]) -> dict[str, float]:
    """The last line of a command's output, as JSON."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-400:]}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def model_file(name: str, kind: str | None, peer_python: str, folder: Path) -> Path:
    """The catalogue's file, or that file in another block type."""
    from septet.hub.pull import resolve

    source = Path(resolve(name).path)
    if kind is None:
        return source
    target = folder / f"{name}-{kind}.gguf"
    if not target.exists():
        subprocess.run([peer_python, str(PEER), "--quantize", str(source), str(target), kind], check=True)
    return target


def one_round(entry: Entry, path: Path, peer_python: str, septet_first: bool) -> None:
    from septet.bench.cpu_probe import bandwidth_gb_s

    sides = [
        (entry.septet, [sys.executable, "-m", "septet.bench.cpu_workloads", "--model", str(path), "--json", "-"]),
        (entry.llama_cpp, [peer_python, str(PEER), str(path)]),
    ]
    for figures, command in sides if septet_first else reversed(sides):
        entry.probe_gb_s.append(bandwidth_gb_s())
        for name, value in run_json(command).items():
            if name in FIGURES:
                figures.setdefault(name, []).append(value)


def table(entries: dict[str, Entry]) -> str:
    lines = [
        "| file | workload | Septet tok/s | llama.cpp tok/s | ratio | share of bandwidth |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for label, entry in entries.items():
        ours, theirs = entry.medians(entry.septet), entry.medians(entry.llama_cpp)
        probe = statistics.median(entry.probe_gb_s)
        for name, title in FIGURES.items():
            share = f"{ours[name] * entry.n_bytes / 1e9 / probe:.0%} of {probe:.0f} GB/s" if name == "tg128" else ""
            ratio = ours[name] / theirs[name]
            lines.append(f"| {label} | {title} | {ours[name]:.0f} | {theirs[name]:.0f} | {ratio:.2f}x | {share} |")
    return "\n".join(lines)


def machine() -> dict[str, object]:
    names = {line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")}
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "").split()
    isa = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if flag in flags]
    return {"cpu": sorted(names), "cpus": len(os.sched_getaffinity(0)), "isa": isa, "python": platform.python_version()}


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    entries: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {label: model_file(*MODELS[label], args.peer_python, Path(folder)) for label in args.models}
        for turn in range(args.rounds):
            for label, path in paths.items():
                entry = entries.setdefault(label, Entry(path.stat().st_size))
                one_round(entry, path, args.peer_python, septet_first=turn % 2 == 0)
                print(f"round {turn + 1}: {label}", file=sys.stderr)
    print(table(entries))
    if args.json:
        document = {
            "command": " ".join(["python -m septet.bench.cpu_table", *sys.argv[1:]]),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "files": {label: vars(entry) for label, entry in entries.items()},
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
