"""JSON schemas made at random, of everything that the grammar room takes: for tests of constrained output."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
NAMES = ("id", "name", "tags", "ä key", "a b", 'quo"te', "$x", "value", "next")
PATTERNS = ("^[a-c]{2,4}$", "^x\\d+$", "[0-9]", "^(ab|cd)*e?$", "^[A-Z][a-z]{0,5}( [A-Z])?$", "^\\w\\s\\w$")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


def schema(seed: int) -> Schema:
    """One schema with a few levels; about every fifth refers to definitions, possibly to itself."""
    rng = random.Random(seed)
    made = node(rng, 3)
    if rng.random() < 0.2:
        made = recursive(rng)
    return made


def recursive(rng: random.Random) -> Schema:
    tree: Schema = {
        "type": "object",
        "properties": {
            "value": leaf(rng),
            "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
            "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
        },
        "required": rng.sample(["value", "next", "children"], 2),
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}


def node(rng: random.Random, depth: int) -> Schema:
    kinds = [leaf] if depth == 0 else [leaf, object_, array, union, composed]
    kind = rng.choice(kinds)
    return leaf(rng) if kind is leaf else kind(rng, depth - 1)  # type: ignore[operator]


def leaf(rng: random.Random) -> Schema:
    return rng.choice(
        (string, number, integer, enumeration, constant, lambda _: {"type": rng.choice(["boolean", "null"])})
    )(rng)


def string(rng: random.Random) -> Schema:
    roll = rng.random()
    if roll < 0.3:
        low = rng.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(6)}
    if roll < 0.55:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if roll < 0.8:
        return {"type": "string", "format": rng.choice(FORMATS)}
    return {"type": "string"}


def integer(rng: random.Random) -> Schema:
    low = rng.randrange(-50, 50)
    bounds: Schema = {"type": "integer"}
    if rng.random() < 0.7:
        bounds[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.7:
        bounds[rng.choice(["maximum", "exclusiveMaximum"])] = low + 2 + rng.randrange(1000)
    if rng.random() < 0.2:
        bounds["multipleOf"] = rng.choice([2, 5, 7])
    return bounds


def number(rng: random.Random) -> Schema:
    low = rng.randrange(-40, 40) / 4
    bounds: Schema = {"type": "number"}
    if rng.random() < 0.7:
        bounds["minimum"] = low
    if rng.random() < 0.7:
        bounds["maximum"] = low + rng.choice([0.5, 1, 12.25])
    return bounds


def enumeration(rng: random.Random) -> Schema:
    return {"enum": rng.sample(["a", "b\n", 'c"', 1, -2.5, None, True, [1, "x"], {"k": 1}], rng.randrange(1, 5))}


def constant(rng: random.Random) -> Schema:
    return {"const": rng.choice(["ü", 7, None, False, {"deep": [1, {"x": None}]}])}


def object_(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(NAMES, rng.randrange(0, 4))
    made: Schema = {"type": "object", "properties": {name: node(rng, depth) for name in names}}
    made["required"] = [name for name in names if rng.random() < 0.5]
    roll = rng.random()
    if roll < 0.6:
        made["additionalProperties"] = False
    elif roll < 0.8:
        made["additionalProperties"] = leaf(rng)
    if roll > 0.9:
        made["patternProperties"] = {"^p_": {"type": "integer"}}
    return made


def array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    made: Schema = {"type": "array", "items": node(rng, depth), "minItems": low, "maxItems": low + rng.randrange(3)}
    if rng.random() < 0.3:
        made["prefixItems"] = [leaf(rng), leaf(rng)]
        made["maxItems"] += 2
        made["items"] = rng.choice([False, leaf(rng)])
        made["minItems"] = min(low, 2)
    return made


def union(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.6:
        return {"anyOf": [node(rng, depth) for _ in range(rng.randrange(1, 4))]}
    variants = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": node(rng, depth)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for kind in ("one", "two")
    ]
    return {"oneOf": variants}


def composed(rng: random.Random, depth: int) -> Schema:
    """allOf, a list of types, or a reference beside other keywords."""
    roll = rng.random()
    if roll < 0.4:
        parts = [{"type": "object", "properties": {name: leaf(rng)}, "required": [name]} for name in ("left", "right")]
        return {"allOf": parts}
    if roll < 0.7:
        return {"type": rng.sample(["string", "integer", "null", "boolean"], 2), "maxLength": 4}
    return {"$defs": {"one": string(rng)}, "type": "array", "items": leaf(rng), "maxItems": 2}
