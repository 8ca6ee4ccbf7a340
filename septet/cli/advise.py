"""`septet advise`: which engine, which settings, and what the answer rests on. Asks what is not given."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from septet.advisor.advise import Advice, Question, Ranked, Told

__all__ = ["advise"]

WIDTH = 118


@click.command()
@click.option("--hardware", help="h100, nvidia, amd, apple, cpu or edge; or a machine of septet plan, as mi300x.")
@click.option("--use", help="chat, agents, json, latency, edge, local, production or cost.")
@click.option("--priority", help="throughput, latency, agents, ease, flexibility or community.")
@click.option("--model", default="", help="A model, by name or path: does it fit, and Septet's own command.")
@click.option("--users", type=click.IntRange(min=1), help="Concurrent users: engines and machines have limits.")
@click.option(
    "--svg",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the decision tree as a picture.",
)
@click.option("--json", "as_json", is_flag=True, help="The answer as JSON.")
def advise(
    hardware: str | None,
    use: str | None,
    priority: str | None,
    model: str,
    users: int | None,
    svg: Path | None,
    as_json: bool,
) -> None:
    """Advise on an engine and its settings for a workload.

    \b
    septet advise --hardware h100 --use agents --priority throughput
    septet advise --hardware rtx4090 --use local --priority ease --model llama-8b
    """
    from septet.advisor.advise import Question
    from septet.advisor.advise import advise as answer

    question = Question(
        hardware=_asked("hardware", hardware),
        use=_asked("use", use),
        priority=_asked("priority", priority),
        model=model,
        users=users,
    )
    found = answer(question)
    if svg is not None:
        _draw(question, svg)
    click.echo(json.dumps(found.data(), indent=1) if as_json else "\n".join(_lines(found)))


def _asked(name: str, given: str | None) -> str:
    from septet.advisor.advise import choices

    if given is not None:
        return given
    known = choices(name)
    if not sys.stdin.isatty():
        raise click.UsageError(f"give --{name}: {', '.join(known)}")
    for key, title in known.items():
        click.echo(f"  {key:12} {title}")
    if name == "hardware":  # a machine's name too: the question checks it
        return str(click.prompt(name))
    return str(click.prompt(name, type=click.Choice(list(known))))


def _draw(question: Question, to: Path) -> None:
    from septet.advisor.tree import decision_tree

    try:
        to.write_text(decision_tree(question), encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"the picture could not be written to {to}: {error.strerror}") from None


def _lines(found: Advice) -> list[str]:
    return [
        *_heading(found),
        *(line for ranked in found.ranking for line in _ranked(ranked)),
        *_section("out", (f"{out.title}: {out.why}" for out in found.out)),
        *_section("counted for nothing", found.silent),
        *_section("mind", (_told(told) for told in found.warnings)),
        *_section("model and users", found.fit),
        *_section("what would change the answer", found.changes),
        *_section(
            "corrected since it was published",
            (f"{c['about']}: {c['published']} -> {c['now']} [{c['source']}]" for c in found.corrections),
        ),
        *_profile(found),
        *_legend(),
    ]


def _heading(found: Advice) -> list[str]:
    from septet.advisor.advise import choices

    q = found.question
    where, use, priority = (choices(name)[getattr(q, name)] for name in ("hardware", "use", "priority"))
    users = f", {q.users:,} user{'s' * (q.users > 1)}" if q.users is not None else ""
    lines = [f"{use} on {where}, {priority} first{users}", *_machine(q), ""]
    for told in found.contradictions:
        lines += _wrapped(f"CONTRADICTION: {_told(told)}", "")
    lines += [""] * bool(found.contradictions)
    return lines if found.ranking else [*lines, "no engine can be had for this question"]


def _machine(question: Question) -> list[str]:
    """Which machine the class stands for, or was named by."""
    from septet.advisor.hardware import hardware

    if not question.machine:
        return []
    return [f"(ranked as this class of hardware; sums are made for {hardware(question.machine).title})"]


def _ranked(ranked: Ranked) -> list[str]:
    place = f"{ranked.place}{'=' if ranked.tied else '.'}"
    lines = [f"{place:3} {ranked.title}, {ranked.points:.2f} points"]
    for c in ranked.lines:
        less = f" (counts less: {', '.join(c.less)})" if c.less else ""
        lines += _wrapped(f"{c.points:.2f} {c.dimension}: {_told(c.told)}{less}", "    ")
    for told in ranked.cautions:
        lines += _wrapped(f"but: {_told(told)}", "    ")
    return lines


def _profile(found: Advice) -> list[str]:
    profile = found.profile
    if not profile["command"]:
        lines = _section("Septet's own profile: none", [profile["why"]])
    else:
        steps = [command for command in (profile["before"], profile["command"]) if command]
        lines = ["", f"Septet's own profile ({profile['why']})", *(f"  {command}" for command in steps)]
        lines += _wrapped(profile["note"], "  ") if profile["note"] else []
    return [*lines, *_section("how many devices", [found.plan] if found.plan else [])]


def _legend() -> list[str]:
    from septet.advisor.rules import rules

    points = rules()["points"]
    weights = ", ".join(f"{name} {weight}" for name, weight in points["weights"].items())
    less = ", ".join(f"{what} x {factor:g}" for factor, what in points["factors"].values())
    return _section(
        "how to read this",
        [
            f"points: {points['about']} Weights: {weights}. Factors: {less}. {points['rule']}",
            *(f"{known}: {what}" for known, what in rules()["known"].items()),
        ],
    )


def _told(told: Told) -> str:
    rests = f"{told.known}: {told.source}" if told.source else told.known
    return f"{told.says} [{rests}{f'; seen on {told.seen}' if told.seen else ''}]"


def _section(title: str, entries: object) -> list[str]:
    lines = [line for entry in entries for line in _wrapped(entry, "  ")]  # type: ignore[attr-defined]
    return ["", title, *lines] if lines else []


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
