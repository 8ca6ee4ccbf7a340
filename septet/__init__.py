"""Septet: an LLM inference engine. `from septet import LLM, SamplingParams` loads nothing heavy until it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from septet.request import SamplingParams
    from septet.session.llm import LLM, AsyncLLM
    from septet.structured import Structured

__all__ = ["LLM", "AsyncLLM", "SamplingParams", "Structured", "__version__"]

__version__ = "0.1.0"

_WHERE = {
    "LLM": "septet.session.llm",
    "AsyncLLM": "septet.session.llm",
    "SamplingParams": "septet.request",
    "Structured": "septet.structured",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'septet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
