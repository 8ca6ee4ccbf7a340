"""Every bound on grammars in one place: what a spec may hold, how long it may take, how much is kept.

Read by the other files of this room. The figures are measured: see each line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

# -- what a spec may hold
MAX_DEPTH = 64  # of nested schemas
MAX_NODES = 20_000  # schemas in a schema
MAX_PROPERTIES = 512  # of one object; the time of optional ones grows with their square
MAX_ENUM = 8192  # values in all enums together, and options of a choice
MAX_MIN_LENGTH = 1 << 16  # characters: a longer string would not fit an answer
MAX_MIN_ITEMS = 1 << 14
MAX_REGEX_CHARS = 8192
MAX_REGEX_DEPTH = 64  # nested groups
MAX_REGEX_SIZE = 8192  # atoms once bounded repeats are written out
MAX_STRUCTURES = 256  # islands of a structural tag

# -- how long and how much
COMPILE_DEADLINE_S = 10.0  # wall clock of the trial; its process is killed then
TRIAL_MEMORY = 2 << 30  # bytes of address space of the trial process
TRIAL_TOKENS = 48  # steps of the random walk that a new grammar is tried with
SLOW_MASK_S = 0.5  # a mask of the trial that takes longer refuses the grammar: it would hold up every stream
WORKERS = 2  # grammars in the making at a time

# -- what is kept
CACHE_ENTRIES = 256  # compiled grammars, and refusals
CACHE_SPEC_BYTES = 8 << 20
LANES = 512  # lexers of all grammars together that are kept for answers to come: up to 3 MiB each once they have worked
WIDEN_S = 0.1  # that a request may wait for more lanes of its grammar, beyond the first


def parser_limits() -> LLParserLimits:
    """Fuel of one mask: about 5 ms in the lexer and 1 ms in the parser, then the request ends with an error."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
