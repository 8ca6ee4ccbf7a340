"""What a created model's PARAMETERs fill in where a request is silent, in any dialect.

Called with a decoded body before it is parsed, so that a default behaves as if the client had sent it. What a dialect
has no field for is set on the parsed call: nobody can have said otherwise. Ollama's dialect asks its recipe itself,
because its own defaults come behind. Knows names of fields, not what they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from septet.errors import ModelNotFound
from septet.hub.parameters import sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.serve.service import Service

__all__ = ["OPENAI_NAMES", "Names", "defaults_of", "filled", "with_defaults"]

T = TypeVar("T")
Names = Mapping[str, tuple[str, ...]]
"""A name of `SamplingParams` -> the dialect's fields for it; the first is filled in where none is given."""

_SAME = "temperature top_p top_k min_p seed presence_penalty frequency_penalty repetition_penalty stop"
OPENAI_NAMES: Names = {
    **{name: (name,) for name in _SAME.split()},
    "max_tokens": ("max_tokens", "max_completion_tokens"),
}


def defaults_of(service: Service, model: Any) -> dict[str, Any]:
    """As arguments of `SamplingParams`; {} for a model without any, or one that is not there (told elsewhere)."""
    with suppress(ModelNotFound):
        recipe = service.models.find(model if isinstance(model, str) and model else None).recipe
        if recipe is not None and recipe.parameters:
            values = sampling(recipe.parameters)
            if "repeat_penalty" not in recipe.parameters:
                del values["repetition_penalty"]
            return values
    return {}


def filled(body: Mapping[str, Any], values: Mapping[str, Any], names: Names) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the body with what it leaves open, the values that the dialect has no field for). null leaves open."""
    added: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in values.items():
        fields = names.get(name)
        if fields is None:
            rest[name] = value
        elif all(body.get(field) is None for field in fields):
            added[fields[0]] = list(value) if isinstance(value, tuple) else value
    return {**body, **added}, rest


def with_defaults(
    service: Service,
    body: dict[str, Any],
    names: Names,
    parse: Callable[[dict[str, Any]], T],
    fill: Callable[[dict[str, Any], dict[str, Any], Names], tuple[dict[str, Any], dict[str, Any]]] = filled,
) -> T:
    """`parse` of the body, with the defaults of the model that it names. The call has `params`."""
    values = defaults_of(service, body.get("model"))
    if not values:
        return parse(body)
    body, rest = fill(body, values, names)
    call: Any = parse(body)
    return replace(call, params=replace(call.params, **rest)) if rest else call  # type: ignore[no-any-return]
