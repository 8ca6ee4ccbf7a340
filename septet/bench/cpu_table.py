"""`make bench-cpu`: Septet beside llama.cpp and vLLM's CPU build in one run, with a bandwidth probe between.

    python -m septet.bench.cpu_table --peer-python PEER/bin/python [--vllm-python PEER/bin/python] [--rounds 3]
        [--files "smollm2 Q4_0" ...] [--sides septet llama_cpp vllm_cpu] [--json PATH] [--add]

Each round runs the sides on each file, alternating who goes first, each in a process of its own; the table shows
medians over rounds. The share of the limit is the bytes of weights that one stream reads per second over the probe
beside it, and others' CPU the share of the machine that other programs took meanwhile: figures of a busy machine say
little, least of all of spinning threads. Files in other block types are made from the catalogue's by llama.cpp's
quantiser (speed tests only). A start is timed until its process has ended; beside Septet's stands a bare `import torch`
of the same minute. vLLM reads no such files: it runs a dense model of the same shape (bf16, or float32 where
the CPU has no bf16). `--add` adds rounds to those that PATH holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septet.bench.cpu_host import bytes_per_token
from septet.bench.host import Neighbours, head, run_job, write_results

if TYPE_CHECKING:
    from collections.abc import Iterator

TITLES = {"tg128": "one stream", "pp512": "prefill 512", "b8": "8 streams", "b32": "32 streams"}
STARTS = {"cold_s": "start to first token, s", "torch_s": "of which `import torch` alone, s"}
FILES = {
    "smollm2 Q4_1": ("smollm2", None),
    "smollm2 Q4_0": ("smollm2", "Q4_0"),
    "smollm2 Q8_0": ("smollm2", "Q8_0"),
    "smollm2 Q4_K_M": ("smollm2", "Q4_K_M"),
    "gemma3:270m Q4_K_M": ("gemma3:270m", None),
}
SIDES = ("septet", "llama_cpp", "vllm_cpu")
VLLM_MODEL = "smollm2 Q4_1"  # whose shape it runs; its figures do not depend on the block type
HERE = Path(__file__).parent
Values = dict[str, list[float]]


@dataclass
class Entry:
    """One file: figures of each side, one value per round."""

    n_bytes: int  # of weights, read per token
    probe_gb_s: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)  # share of the CPUs that other programs took meanwhile
    sides: dict[str, Values] = field(default_factory=dict)

    def median(self, side: str, figure: str) -> float | None:
        values = self.sides.get(side, {}).get(figure)
        return statistics.median(values) if values else None

    def note(self, side: str, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.sides.setdefault(side, {}).setdefault(name, []).append(round(value, 3))


@dataclass(frozen=True)
class Peers:
    """Where the sides' Pythons are; "" = that side is missing."""

    llama_cpp: str
    vllm_cpu: str = ""

    def has(self, side: str) -> bool:
        return side == "septet" or bool(getattr(self, side))


def run_json(command: list[str]) -> dict[str, float]:
    """The last JSON object among the lines of a command's output: a peer may say something after it."""
    done = run_job(command, 900, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-400:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{' '.join(command[:3])} printed no figures: {done.stdout.strip()[-400:]}")
    figures: dict[str, float] = json.loads(lines[-1])
    return figures


def seconds_of(command: list[str]) -> float:
    began = time.perf_counter()
    done = run_job(command, 300, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seconds = time.perf_counter() - began
    done.check_returncode()
    return seconds


# -- files ------------------------------------------------------------------------------------------------------------
def model_file(label: str, peers: Peers, folder: Path) -> Path:
    """The catalogue's file, or that file in another block type."""
    from septet.hub.pull import resolve

    name, kind = FILES[label]
    source = Path(resolve(name).path)
    if kind is None:
        return source
    target = folder / f"{name}-{kind}.gguf"
    if not target.exists():
        script = str(HERE / "cpu_llama_cpp.py")
        subprocess.run([peers.llama_cpp, script, "--quantize", str(source), str(target), kind], check=True)
    return target


def checkpoint(source: Path, folder: Path) -> Path:
    """The file's shape as a checkpoint for vLLM."""
    target = folder / "checkpoint"
    if not target.exists():
        script = str(HERE / "cpu_vllm.py")
        subprocess.run([sys.executable, script, "--shape", str(source), str(target)], check=True)
    return target


# -- rounds -----------------------------------------------------------------------------------------------------------
def figures_of(side: str, path: Path, peers: Peers, folder: Path) -> dict[str, float]:
    """One process: the workloads. For the default model the time from start to first token as well."""
    if side == "vllm_cpu":
        return run_json([peers.vllm_cpu, str(HERE / "cpu_vllm.py"), str(checkpoint(path, folder)), "--repeat", "2"])
    if side == "llama_cpp":
        command = [peers.llama_cpp, str(HERE / "cpu_llama_cpp.py"), str(path), "--repeat", "2"]
        first = [*command, "--first"]
    else:
        workloads = [sys.executable, "-m", "septet.bench.cpu_workloads"]
        command = [*workloads, "--model", str(path), "--repeats", "2", "--json", "-"]
        first = [sys.executable, "-m", "septet.cli.main", "run", str(path), "Hello"]
        first += ["--max-tokens", "1", "--temperature", "0", "--no-stats"]
    figures = {name: value for name, value in run_json(command).items() if name in TITLES}
    if "smollm2" in path.name.lower():
        figures["cold_s"] = seconds_of(first)
        if side == "septet":
            figures["torch_s"] = seconds_of([sys.executable, "-c", "import torch"])
    return figures


def one_side(entry: Entry, side: str, path: Path, peers: Peers, folder: Path) -> None:
    from septet.bench.cpu_probe import bandwidth_gb_s

    entry.probe_gb_s.append(round(bandwidth_gb_s(256 << 20, 3), 2))
    neighbours = Neighbours()
    figures = figures_of(side, path, peers, folder)
    entry.others.append(round(neighbours.share(), 3))
    entry.note(side, figures)


def measure(entries: dict[str, Entry], args: argparse.Namespace, peers: Peers) -> Iterator[str]:
    """All rounds; yields what was measured after each side."""
    from septet.hub.model_config import read_model_config

    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made)
        for label in args.files:
            sides = [s for s in args.sides if peers.has(s) and (s != "vllm_cpu" or label == VLLM_MODEL)]
            if not sides:
                continue
            path = model_file(label, peers, folder)
            entry = entries.setdefault(label, Entry(bytes_per_token(path, read_model_config(path))[0]))
            for turn in range(args.rounds):
                first = len(entry.probe_gb_s) // len(sides) % 2 == 0
                for side in sides if first else sides[::-1]:
                    one_side(entry, side, path, peers, folder)
                    yield f"{label}: round {turn + 1}, {side}"


# -- the table --------------------------------------------------------------------------------------------------------
def table(entries: dict[str, Entry]) -> str:
    lines = [
        "| file | workload | Septet | llama.cpp | ratio | vLLM, dense | ratio | of the bandwidth | others' CPU |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    vllm = entries.get(VLLM_MODEL, Entry(0))
    for label, entry in entries.items():
        for name, title in {**TITLES, **STARTS}.items():
            ours, theirs = entry.median("septet", name), entry.median("llama_cpp", name)
            if ours is None:
                continue
            third = vllm.median("vllm_cpu", name) if label.startswith("smollm2") else None
            cells = [_cell(ours), _cell(theirs), _ratio(ours, theirs, name), _cell(third), _ratio(ours, third, name)]
            probe = statistics.median(entry.probe_gb_s)
            share = f"{ours * entry.n_bytes / 1e9 / probe:.0%} of {probe:.0f} GB/s" if name == "tg128" else ""
            busy = f"{statistics.median(entry.others):.0%}" if name == "tg128" and entry.others else ""
            lines.append(f"| {label} | {title} | {' | '.join(cells)} | {share} | {busy} |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 20 else f"{value:.0f}"


def _ratio(ours: float, theirs: float | None, figure: str) -> str:
    """How many times better Septet is: in speed, or in time where less is better."""
    if not theirs:
        return "-"
    return f"{theirs / ours if figure in STARTS else ours / theirs:.2f}x"


def read(path: Path | None) -> tuple[dict[str, Entry], list[dict[str, Any]]]:
    """(entries, runs) of an earlier document."""
    if path is None or not path.exists():
        return {}, []
    document = json.loads(path.read_text())
    return {label: Entry(**values) for label, values in document["files"].items()}, document["runs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--vllm-python", default="", help="Python of an environment with vllm-cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", nargs="*", default=list(FILES), choices=list(FILES), metavar="FILE")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--folder", type=Path, help="where made files are kept [a temporary one]")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true", help="to what the JSON file holds")
    args = parser.parse_args()
    peers = Peers(args.peer_python, args.vllm_python)
    entries, runs = read(args.json if args.add else None)
    about = head("cpu_table")
    runs.append({name: about[name] for name in ("command", "commit", "date")})
    for done in measure(entries, args, peers):
        print(done, file=sys.stderr, flush=True)
        if args.json:
            write_results(args.json, about, runs=runs, files={label: asdict(e) for label, e in entries.items()})
    print(table(entries))


if __name__ == "__main__":
    main()
