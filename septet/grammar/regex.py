"""What a regular expression would cost, before it is compiled: length, nesting, bounded repeats written out.

Called by `schema.py` and `translate.py`. Syntax is checked by the compiler; the scan here only needs to see groups,
classes and repeats. The automaton behind is linear-time: nested stars are harmless, `(a{1000}){1000}` is not.
"""

from __future__ import annotations

import re

from septet.errors import InvalidRequest
from septet.grammar import limits

__all__ = ["ascii_classes", "check_regex", "regex_size"]

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|\{(\d+)(,?)(\d*)\}|[()]|.", re.DOTALL)


_NARROW = {"\\d": "0-9", "\\w": "0-9A-Za-z_", "\\s": r" \t\n\r\f\v"}


def check_regex(pattern: str, what: str) -> None:
    """InvalidRequest, opening with `what`, for an expression beyond our limits."""
    if len(pattern) > limits.MAX_REGEX_CHARS:
        raise InvalidRequest(
            f"{what}: a pattern of {len(pattern)} characters; at most {limits.MAX_REGEX_CHARS} are taken",
            param="structured",
        )
    size = regex_size(pattern)
    if size is None:
        raise InvalidRequest(
            f"{what}: a pattern with groups nested deeper than {limits.MAX_REGEX_DEPTH}", param="structured"
        )
    if size > limits.MAX_REGEX_SIZE:
        raise InvalidRequest(
            f"{what}: a pattern whose bounded repeats come to {size:.3g} parts; at most {limits.MAX_REGEX_SIZE} "
            "are taken",
            param="structured",
        )


def regex_size(pattern: str) -> float | None:
    """Atoms once `{m,n}` are written out; None if groups nest too deeply. Unbalanced parentheses are not our matter."""
    stack = [0.0]  # size of each open group so far
    last = 0.0  # of the atom that a repeat would apply to
    for token in _TOKEN.finditer(pattern):
        text = token.group()
        if text == "(":
            if len(stack) > limits.MAX_REGEX_DEPTH:
                return None
            stack.append(0.0)
            last = 0.0
        elif text == ")":
            last = stack.pop() if len(stack) > 1 else 0.0
            stack[-1] += last
        elif token.group(1) is not None:
            times = float(max(int(token.group(1)), int(token.group(3) or 0), 1))
            stack[-1] += last * (times - 1)
            last *= times
        elif text not in "*+?|":
            last = 1.0
            stack[-1] += 1.0
    return sum(stack)


def ascii_classes(pattern: str) -> str:
    """d, w and s classes in ECMA-262's narrow sense, as JSON schema means them; the library means all of Unicode."""
    return _TOKEN.sub(lambda token: _narrow(token.group()), pattern)


def _narrow(text: str) -> str:
    if text.startswith("[") and len(text) > 1:
        return re.sub(r"\\.", lambda escape: _NARROW.get(escape.group(), escape.group()), text, flags=re.DOTALL)
    inner = _NARROW.get(text)
    return text if inner is None else f"[{inner}]"
