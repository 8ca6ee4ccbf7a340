"""Septet's own settings for a question, as commands to paste: quoted, and only where this release can run them.

Called by `advise.py`. Which flags belong to which answer is in `rules.json`.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from septet.advisor.hardware import hardware, known_models
from septet.advisor.rules import choices, engines, on_class, rules, status

if TYPE_CHECKING:
    from septet.advisor.advise import Question
    from septet.advisor.fit import Fit

__all__ = ["plan_command", "profile"]

UNNAMED = "MODEL"


def profile(question: Question, fit: Fit, out: str) -> dict[str, Any]:
    """{"command", "before", "why", "note"}; without a command, `why` says why there is none.

    out: why Septet is not ranked; "" if it is."""
    own, where = rules()["own"], choices("hardware")[question.hardware]
    if out:
        return _none(f"{engines()[own]['title']}: {out}")
    here = status(own, question.hardware)
    if fit.own == "no":
        return _none(
            f"{question.model} does not fit one {hardware(question.machine).title} in what "
            "this release runs: bf16, or a GGUF file"
        )
    found = [on_class(rules()["profiles"]["use"][question.use], question.hardware)]
    first = rules()["profiles"]["priority"].get(question.priority)
    if first is not None:  # what matters most has the last word
        found.append(on_class(first, question.hardware))
    flags = {flag: value for entry in found for flag, value in entry["flags"].items()}
    whys = [e["why"] for e in found[:1] if not e["flags"] or any(flags[flag] == v for flag, v in e["flags"].items())]
    whys += [e["why"] for e in found[1:] if e["flags"].items() - found[0]["flags"].items()]
    notes = [f"not tested on {where}: {here.note}"] if here.kind == "assumed" else []
    model, said = _model(question, fit)
    return {
        "command": _command("serve", model, [part for pair in flags.items() for part in pair if part]),
        "before": "; ".join(entry["before"] for entry in found if "before" in entry),
        "why": "; ".join(whys),
        "note": "; ".join([*said, *notes]),
    }


def plan_command(question: Question, fit: Fit) -> str:
    """How many devices: for the machine that was asked about. "" where `septet plan` has no figures for it."""
    if not question.machine or (question.model and not fit.planned):
        return ""
    flags = ["--hardware", question.machine]
    flags += ["--users", str(question.users)] if question.users is not None else []
    return _command("plan", question.model or UNNAMED, flags)


def _model(question: Question, fit: Fit) -> tuple[str, list[str]]:
    """What `septet serve` is to be given, and what is to be said of it."""
    if not question.model:
        return UNNAMED, []
    if fit.own == "small":
        return UNNAMED, [f"{question.model} fits as a GGUF file of four bits: put its path for {UNNAMED}"]
    if question.model in known_models():
        return UNNAMED, [f"{question.model} is a shape to plan with: put your checkpoint of it for {UNNAMED}"]
    return question.model, []


def _command(name: str, model: str, flags: list[str]) -> str:
    end = ["--", model] if model.startswith("-") else []
    return shlex.join(["septet", name, *([] if end else [model]), *flags, *end])


def _none(why: str) -> dict[str, Any]:
    return {"command": "", "before": "", "why": why, "note": ""}
