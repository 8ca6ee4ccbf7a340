"""Whether a model and its users fit the hardware that was named: the arithmetic of `septet plan`, in a few sentences.

Called by `advise.py`, which knows the rankings. Simulates nothing: `septet plan` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from septet.advisor.arrangement import fitting
from septet.advisor.capacity import Demand, Option, Plan, make_plan
from septet.advisor.estimate import Estimator
from septet.advisor.hardware import Hardware, known_models, model_shape
from septet.advisor.rules import rules
from septet.errors import InvalidRequest, OutOfMemory, SeptetError
from septet.geometry import parameter_count

__all__ = ["Fit", "check_fit"]

SINGLE = ("consumer", "apple", "cpu")  # kinds of which one has a machine, not a fleet
OWN_LENGTH = 2048  # tokens of one request that must have room beside the weights
FOUR_BITS = "int4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """impossible: sentences that contradict the question. notes: the others. own: what Septet can hold on one device:
    "yes", "small" (a GGUF file of four bits), "no" or "" (not known)."""

    impossible: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    own: str = ""
    planned: bool = False  # `septet plan` knows the model


def check_fit(model: str, users: int | None, card: Hardware) -> Fit:
    if not model:
        return _smallest(users, card) if users is not None else Fit()
    try:
        config, weights = model_shape(model)
        own = _own(Estimator(config, card, weights=weights), card)
        plan = make_plan(model, config, card, Demand(users=users or 1), weights, check=False)
    except OutOfMemory as error:
        return Fit(impossible=(error.message,), own="no")
    except InvalidRequest as error:
        return Fit(notes=(f"not checked whether it fits: {error.message}",))
    except SeptetError as error:
        return Fit(impossible=(error.message,), own="no")
    impossible, notes = _held(plan, card) if users is None else _crowd(plan, card)
    return Fit(impossible=tuple(impossible), notes=tuple(notes), own=own, planned=True)


def _own(model: Estimator, card: Hardware) -> str:
    """On one device, as this release does: bf16 or a file's own blocks; on CPUs a file of four bits too."""
    tries = {"yes": model}
    if model.weights is None:
        tries["small"] = Estimator(model.config, card, FOUR_BITS)
    for answer, tried in tries.items():
        try:
            length = min(OWN_LENGTH, model.config.max_position)
            fitting(tried, max_num_seqs=1, max_model_len=length, max_num_batched_tokens=OWN_LENGTH)
        except OutOfMemory:
            continue
        return answer if answer == "yes" or card.kind == "cpu" else "no"
    return "no"


def _held(plan: Plan, card: Hardware) -> tuple[list[str], list[str]]:
    """Without users: the fewest devices that hold it, whatever the speed."""
    best = min((o for o in plan.options if o.streams), key=lambda o: (o.tp * o.pp, -o.weights_gib))
    devices, weights = best.tp * best.pp, f"{best.weights_gib:.1f} GiB of weights {_kind(best)}"
    if card.kind in SINGLE and devices > card.per_node:
        gib = card.memory_mib * card.per_node / 1024
        return [f"{plan.model} does not fit {_cards(card.per_node, card)}, {gib:.0f} GiB: {weights}"], []
    return [], [f"{plan.model} fits {_cards(devices, card)}: {weights}", *_slow(plan)]


def _crowd(plan: Plan, card: Hardware) -> tuple[list[str], list[str]]:
    """With users: what they need, and whether that is one machine."""
    best, users = plan.best, plan.demand.users
    needs = f"{users:,} user{'s' * (users > 1)} of {plan.model} need about {_cards(best.devices, card)} ({_kind(best)})"
    if card.kind in SINGLE and best.devices > rules()["largest"].get(card.kind, card.per_node):
        return [f"{needs}: beyond one machine"], []
    return [], [f"{needs}, by arithmetic alone", *_slow(plan)]


def _slow(plan: Plan) -> list[str]:
    """Where no arrangement meets the targets that `septet plan` has by default."""
    if plan.best.meets:
        return []
    d = plan.demand
    return [
        f"slower than the targets of `septet plan` ({d.ttft_ms:g} ms to the first token of a prompt of {d.prompt:,}, "
        f"{d.tpot_ms:g} ms a token after it) in every arrangement: {plan.best.ttft_ms:,.0f} and "
        f"{plan.best.tpot_ms:,.0f} ms in the closest"
    ]


@lru_cache(maxsize=64)
def _smallest(users: int | None, card: Hardware) -> Fit:
    """No model named: if even the smallest known shape is too much for so many on one machine, say so."""
    if card.kind not in SINGLE:
        return Fit()
    shapes = {name: model_shape(name)[0] for name in known_models()}
    name = min(shapes, key=lambda each: parameter_count(shapes[each]))
    impossible, _ = _crowd(make_plan(name, shapes[name], card, Demand(users=users or 1), check=False), card)
    why = "a 135M may do where this does not" if card.kind == "cpu" else "smaller models need less"
    return Fit(impossible=tuple(f"{each} ({name} is the smallest shape known here; {why})" for each in impossible))


def _kind(option: Option) -> str:
    return "as in the file" if option.quant == "file" else f"in {option.quant}"


def _cards(n: int, card: Hardware) -> str:
    return f"{n:,} x {card.title}"
