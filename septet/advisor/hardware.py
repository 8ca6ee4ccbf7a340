"""Machines and model shapes that a plan can be made for: `hardware.json`, read once.

Used by the whole room and by its commands. Data sheets are derated to what a measured card reaches of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from septet.config import ModelConfig
from septet.errors import InvalidRequest, SeptetError

__all__ = ["Hardware", "all_hardware", "hardware", "known_models", "model_shape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    name: str
    title: str
    kind: str  # "nvidia" | "consumer" | "amd" | "apple" | "cpu"
    memory_mib: int  # free before anything is loaded
    read_gb_s: float  # memory, reached
    bf16_tflops: float  # dense matrices, reached
    fp8_tflops: float  # 0: has none
    link_gb_s: float  # one way, to each other device of the node
    usd_per_hour: float
    measured: bool  # False: from a data sheet, derated
    per_node: int  # devices that share `link_gb_s`
    septet_lacks: str = ""  # why this release of Septet is not for it


@cache
def _table() -> dict[str, Any]:
    return json.loads(files("septet.advisor").joinpath("hardware.json").read_text())  # type: ignore[no-any-return]


@cache
def all_hardware() -> tuple[Hardware, ...]:
    derate = _table()["derate"]
    found = []
    for entry in _table()["hardware"]:
        h = Hardware(**entry, septet_lacks=_table()["septet_lacks"].get(entry["kind"], ""))
        if not h.measured:
            rates = {name: round(getattr(h, name) * derate["compute"], 2) for name in ("bf16_tflops", "fp8_tflops")}
            h = replace(h, read_gb_s=round(h.read_gb_s * derate["read"], 1), **rates)
        found.append(h)
    return tuple(found)


def hardware(name: str) -> Hardware:
    """By name, as of `all_hardware`. InvalidRequest names the known ones."""
    wanted = "".join(c for c in name.lower() if c.isalnum()).removeprefix("nvidia").removeprefix("amd")
    for h in all_hardware():
        if wanted == h.name or wanted.startswith(h.name):
            return h
    known = ", ".join(h.name for h in all_hardware())
    raise InvalidRequest(f"no figures for the hardware {name!r}; known are {known}", param="hardware")


def known_models() -> tuple[str, ...]:
    return tuple(_table()["models"])


def model_shape(name: str) -> tuple[ModelConfig, int | None]:
    """A model's shape, and the bytes of its weights if its file says so: a known shape, a model of the store by name,
    or the path of a .gguf file, a checkpoint directory or a config.json."""
    shapes = _table()["models"]
    if name in shapes:
        return ModelConfig(**shapes[name]), None
    path = Path(name).expanduser()
    if path.exists():
        from septet.hub.model_config import read_model_config

        of = path.parent if path.name == "config.json" else path
        return read_model_config(of), path.stat().st_size if path.suffix == ".gguf" else None
    try:
        from septet.hub.pull import resolve

        return model_shape(str(resolve(name, pull=False).path))
    except SeptetError:
        raise InvalidRequest(
            f"no model {name!r}: give one of {', '.join(shapes)}, a model of `septet list`, or a path (a .gguf file, a "
            "directory with config.json)",
            param="model",
        ) from None
