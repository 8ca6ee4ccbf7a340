"""Ollama's parameters by name: which there are, of what type, and what they mean as sampling parameters.

Read by `modelfile.py` (PARAMETER) and by the Ollama dialect (`options`). One table, so that both give the same answer.
Standard library and the base room only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.hub.facts import shown
from septet.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEFAULTS", "KNOWN", "checked", "checked_all", "sampling"]

_FLOATS = "temperature top_p min_p typical_p repeat_penalty presence_penalty frequency_penalty tfs_z"
_MORE_FLOATS = "mirostat_tau mirostat_eta rope_frequency_base rope_frequency_scale"
_INTEGERS = (
    "top_k seed num_predict repeat_last_n num_ctx num_keep num_batch num_gpu main_gpu num_thread mirostat num_gqa"
)
_SWITCHES = "use_mmap use_mlock low_vram f16_kv logits_all vocab_only numa penalize_newline embedding_only"

KNOWN: dict[str, type] = {
    **dict.fromkeys((_FLOATS + " " + _MORE_FLOATS).split(), float),
    **dict.fromkeys((_INTEGERS + " draft_num_predict").split(), int),
    **dict.fromkeys(_SWITCHES.split(), bool),
    "stop": list,
}
DEFAULTS: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.0}
"""Where neither the request nor the model says otherwise; Ollama's."""
_SAME_NAME = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")
_OFF = {"typical_p": (0, 1), "tfs_z": (0, 1), "mirostat": (0,)}  # values that change nothing; others are refused
_WHOLE_HISTORY = (-1, 64)  # of repeat_last_n: ours looks at all of it; 64 is Ollama's default, sent by every form


def checked(name: str, value: Any) -> Any:
    """The value of one known parameter in its type. InvalidRequest names it."""
    kind = KNOWN[name]
    if kind is list:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest(f"{name} must be a string or a list of strings, not {shown(value)}", param=name)
        return texts
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and is_number:
        return value
    if kind is int and is_number and value == value // 1 and abs(value) < 2**63:  # a form may send 40.0
        return int(value)
    words = {float: "a number", int: "an integer of 64 bits", bool: "true or false"}[kind]
    raise InvalidRequest(f"{name} must be {words}, not {shown(value)}", param=name)


def checked_all(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that a model is to keep: known ones only, with values that a request could use."""
    for name in values:
        if name not in KNOWN:
            raise InvalidRequest(f"unknown parameter {shown(name)}; known are {', '.join(sorted(KNOWN))}", param=name)
    typed = {name: checked(name, value) for name, value in values.items() if value is not None}
    SamplingParams(**sampling(typed))
    return typed


def sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """What these parameters are as arguments of `SamplingParams`; those about memory and threads mean nothing here."""
    result: dict[str, Any] = {name: values[name] for name in _SAME_NAME if name in values}
    for name, harmless in _OFF.items():
        if values.get(name, harmless[0]) not in harmless:
            raise InvalidRequest(f"{name} is not supported; use temperature, top_p and min_p", param=name)
    result["repetition_penalty"] = _repetition(values)
    if values.get("seed", -1) != -1:
        result["seed"] = values["seed"]
    if values.get("num_predict", -1) > 0:  # -1: to the end of the context, as -2 and 0
        result["max_tokens"] = values["num_predict"]
    if "stop" in values:
        result["stop"] = tuple(values["stop"])
    return result


def _repetition(values: Mapping[str, Any]) -> float:
    penalty = values.get("repeat_penalty", 1.0)
    last_n = values.get("repeat_last_n", -1)
    if last_n == 0:
        return 1.0
    if penalty != 1.0 and last_n not in _WHOLE_HISTORY:
        raise InvalidRequest(
            f"repeat_last_n {last_n} is not supported: repeat_penalty looks at the whole context; leave it out, or 0",
            param="repeat_last_n",
        )
    return penalty
