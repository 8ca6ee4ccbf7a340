"""`septet doctor [MODEL]`: what Septet finds on this machine, what it would choose and why, and what to expect of it.

Starts no engine, downloads nothing, and reports what is missing instead of failing: it must work without a model, a
compiler, a GPU or torch, on one core. Facts are plain data (`--json`); the text is drawn from the same.
"""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import click

from septet.errors import ModelNotFound, SeptetError

if TYPE_CHECKING:
    from septet.hub.store import LocalModel

__all__ = ["doctor", "examine"]

SHARE = 0.7
"""Of the probe's bandwidth: what one stream's decode reaches (`make bench-cpu` measures it)."""


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="The facts as JSON.")
@click.option("--probe/--no-probe", default=True, show_default=True, help="Measure memory bandwidth (under a second).")
def doctor(model: str | None, as_json: bool, probe: bool) -> None:
    """Show this machine, the kernels it gets, the store, and what speed to expect of MODEL.

    MODEL is a name (see `septet list`) or a path. Nothing is downloaded and no engine is started.
    """
    facts = examine(model, probe)
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(_lines(facts)))


def examine(model: str | None = None, probe: bool = True) -> dict[str, Any]:
    """All facts. ModelNotFound for a name that is none; whatever else is wrong is a fact."""
    from septet.bench.cpu_host import libraries, machine

    facts: dict[str, Any] = {"machine": machine(), "bandwidth": None}
    if probe:
        from septet.bench.cpu_probe import probe as measure

        facts["bandwidth"] = measure()
    facts["cpu_kernels"] = cpu_kernels()
    facts["gpus"] = gpus()
    facts["libraries"] = libraries()
    facts["store"] = store()
    if model is not None:
        facts["model"] = model_facts(model, facts["bandwidth"] if facts["cpu_kernels"]["native"] else None)
    return facts


# -- facts ------------------------------------------------------------------------------------------------------------
def cpu_kernels() -> dict[str, Any]:
    """The native library, the path it takes here and why; or why it is not there and what happens instead."""
    from septet.kernels.native.library import FILE, choose_path, load

    try:
        library = load()
        path, reason = choose_path(library)
    except SeptetError as error:
        return {"native": False, "why": str(error), "instead": "reference (torch)"}
    bf16 = path == "avx512" and bool(library.septet_has_bf16())
    return {"native": True, "file": str(FILE), "path": path, "why": reason, "paths": library.paths, "bf16": bf16}


def gpus() -> dict[str, Any]:
    """What torch sees; "why" where it sees none."""
    if importlib.util.find_spec("torch") is None:
        return {"found": [], "why": "torch is not installed"}
    try:
        import torch

        if not torch.cuda.is_available():
            built = torch.version.cuda
            return {"found": [], "why": f"torch (CUDA {built}) sees none" if built else "this torch is for CPUs only"}
        every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found = [{"name": p.name, "memory": p.total_memory, "capability": f"{p.major}.{p.minor}"} for p in every]
    except Exception as error:  # a broken driver or installation is a finding, not a failure
        return {"found": [], "why": f"torch can't tell: {type(error).__name__}: {str(error)[:200]}"}
    return {"found": found, "why": None}


def store() -> dict[str, Any]:
    from septet.hub.store import Store

    where = Store()
    models = [
        {"name": manifest.name, "n_bytes": manifest.n_bytes, "sound": where.local(manifest) is not None}
        for manifest in where.all()
    ]
    return {"home": str(where.home), "models": models}


def model_facts(name: str, bandwidth: dict[str, Any] | None) -> dict[str, Any]:
    """Bytes that one token reads, and with the probe the tokens per second to expect of one stream on the CPU.

    bandwidth None: not probed, or there are no native kernels that could use it.
    """
    from septet.hub.catalog import find
    from septet.hub.pull import resolve

    try:
        local = resolve(name, pull=False)
    except ModelNotFound:
        entry = find(name)
        if entry is None:
            raise
        facts = {"name": entry.name, "pulled": False, "n_bytes_read": entry.n_bytes}
    else:
        facts = {"name": local.name, "pulled": True, **_read_per_token(local)}
    if bandwidth is not None and facts.get("n_bytes_read"):
        facts["share_of_bandwidth"] = SHARE
        facts["expected_tokens_s"] = round(SHARE * bandwidth["gb_s"] * 1e9 / facts["n_bytes_read"], 1)
    return facts


def _read_per_token(local: LocalModel) -> dict[str, Any]:
    from septet.bench.cpu_host import bytes_per_token
    from septet.hub.model_config import read_model_config

    try:
        config = read_model_config(local.path)
        n_bytes, kinds = bytes_per_token(local.path, config)
    except SeptetError as error:
        return {"path": str(local.path), "error": str(error)}
    return {"path": str(local.path), "family": config.architecture, "types": kinds, "n_bytes_read": n_bytes}


# -- text -------------------------------------------------------------------------------------------------------------
def _lines(facts: dict[str, Any]) -> list[str]:
    rows = [*_machine_rows(facts), *_software_rows(facts)]
    if "model" in facts:
        rows += _model_rows(facts["model"], facts["cpu_kernels"]["native"])
    wide = max(len(title) for title, _ in rows)
    return [f"{title:<{wide}}  {''.join(c for c in words if c.isprintable())}" for title, words in rows]


def _machine_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    here, kernels, bandwidth, cards = facts["machine"], facts["cpu_kernels"], facts["bandwidth"], facts["gpus"]
    quota = f"{here['cgroup_quota']:g} by cgroup quota" if here["cgroup_quota"] else "no quota"
    counts = f"{here['cores']} cores, {here['allowed_cores']} allowed, {quota}: {here['threads']} compute threads"
    rows = [
        (
            "cpu",
            f"{', '.join(here['cpu'])} ({here['architecture']}; {' '.join(here['features']) or 'no features known'})",
        ),
        ("cores", counts),
        ("memory", f"{_gib(here['free_memory'])} free"),
    ]
    if bandwidth is not None:
        how = "by numpy, a little less than there is" if bandwidth["by"] == "numpy" else "read by all compute threads"
        rows.append(("bandwidth", f"{bandwidth['gb_s']} GB/s {how} (just now: shared machines vary)"))
    if kernels["native"]:
        rows.append(("cpu kernels", f"native, path {kernels['path']}: {kernels['why']}"))
    else:
        rows.append(("cpu kernels", f"{kernels['instead']}: {kernels['why']}"))
    for card in cards["found"]:
        rows.append(("gpu", f"{card['name']}, {_gib(card['memory'])}, compute capability {card['capability']}"))
    return rows if cards["found"] else [*rows, ("gpu", f"none: {cards['why']}")]


def _software_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    here, kept = facts["machine"], facts["store"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in facts["libraries"].items())
    models = ", ".join(
        f"{m['name']} ({m['n_bytes'] / 1e6:.0f} MB{'' if m['sound'] else ', damaged'})" for m in kept["models"]
    )
    return [
        ("system", f"{here['system']}, Python {here['python']}"),
        ("libraries", versions),
        ("store", kept["home"]),
        ("models", models or "none pulled yet (septet list names some)"),
    ]


def _model_rows(model: dict[str, Any], native: bool) -> list[tuple[str, str]]:
    if "error" in model:
        return [("model", f"{model['name']} can't be run: {model['error']}")]
    if model["pulled"]:
        rows = [("model", f"{model['name']} ({model['family']}, {', '.join(model['types'])}) at {model['path']}")]
    else:
        rows = [("model", f"{model['name']}, not pulled yet: septet pull {model['name']}")]
    rows.append(
        ("reads", f"{model['n_bytes_read'] / 1e6:.1f} MB of weights a token" + (" or less" * (not model["pulled"])))
    )
    if not native:
        rows.append(("expect", "no figure without native kernels: the reference takes several times as long"))
    elif "expected_tokens_s" in model:
        basis = f"{model['share_of_bandwidth']:.0%} of the bandwidth above, one stream, short context"
        rows.append(("expect", f"{model['expected_tokens_s']:.0f} tokens/s on the CPU with native kernels ({basis})"))
    return rows


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
