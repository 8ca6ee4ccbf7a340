"""`septet advise`: which engine, which settings, and what the answer rests on. Asks what is not given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from septet.advisor.advise import Advice

__all__ = ["advise"]


@click.command()
@click.option("--hardware", help="h100, nvidia, amd, apple, cpu or edge.")
@click.option("--use", help="chat, agents, json, latency, edge, local, production or cost.")
@click.option("--priority", help="throughput, latency, agents, ease, flexibility or community.")
@click.option("--model", default="", help="For Septet's own command.")
@click.option("--users", type=int, default=1, show_default=True)
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Write the decision tree as a picture.")
@click.option("--json", "as_json", is_flag=True)
def advise(
    hardware: str | None,
    use: str | None,
    priority: str | None,
    model: str,
    users: int,
    svg: Path | None,
    as_json: bool,
) -> None:
    """Advise on an engine and its settings for a workload.

    \b
    septet advise --hardware h100 --use agents --priority throughput
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
        from septet.advisor.tree import decision_tree

        svg.write_text(decision_tree(question))
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
    return str(click.prompt(name, type=click.Choice(list(known))))


def _lines(found: Advice) -> list[str]:
    q = found.question
    lines = [f"{q.use} on {q.hardware}, {q.priority} first:", ""]
    for place, ranked in enumerate(found.ranking, 1):
        lines.append(f"{place}. {ranked.title}  ({ranked.points:.2f} points)")
        lines += [f"     {where}: {says} [{known}]" for where, says, known in ranked.reasons]
        lines.append(f"     but: {ranked.caution}")
    lines += ["", *(f"out: {name} {why}" for name, why in found.excluded)]
    lines += [f"WARNING: {says}" for says in found.warnings]
    lines += ["", "corrected since it was published:"]
    lines += [f"  {about}: {published} -> {now}" for about, published, now in found.corrections]
    lines += ["", "what would change the answer:", *(f"  {change}" for change in found.changes)]
    lines += ["", f"Septet's own profile ({found.profile_why}):", f"  {found.profile}"]
    if q.users > 1:
        lines.append(f"  how many devices: septet plan {q.model or 'MODEL'} --users {q.users}")
    return lines
