"""`septet bench`: measure engines on workloads, over HTTP like any client; compare and show what was measured.

Holds the options and the progress shown; the measurement is `septet.bench.harness`.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from septet.bench.harness.limits import Limit
    from septet.bench.harness.measure import Progress
    from septet.bench.harness.results import Results
    from septet.bench.harness.targets import Target
    from septet.bench.harness.workload import Workload

__all__ = ["bench"]


class Finite(click.FloatRange):
    """A range that `nan` and `inf` are not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found: float = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is no number to use here", param, ctx)
        return found


ABOVE_0 = Finite(0, min_open=True)


@click.group(invoke_without_command=True)
@click.option("--target", "targets", multiple=True, metavar="ENGINE[:MODEL]", help="septet, vllm, sglang, trtllm, "
              "llama.cpp, ollama, lmdeploy, tgi or transformers; several are alternated [septet:smollm2].")  # fmt: skip
@click.option("--url", "urls", multiple=True, help="A server that runs already (OpenAI's API).")
@click.option("--model", help="The model's name at --url [the first it lists].")
@click.option("--api-key-env", metavar="NAME", help="Environment variable with the key for --url.")
@click.option("--workload", "workloads", multiple=True, help="By name (septet bench list) or a .toml file; several, "
              "or all [single].")  # fmt: skip
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Replay this file.")
@click.option(
    "--time-scale", type=ABOVE_0, default=1.0, show_default=True, help="Of its times: 0.001 where they are ms."
)
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True, help="From 6 on intervals hold.")
@click.option(
    "--scale",
    type=Finite(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Shrink workloads for a small machine.",
)
@click.option("--streams", help="Other numbers of streams, with commas.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--args", "arguments", multiple=True, metavar="ENGINE=ARGS", help="More of its command line.")
@click.option("--program", "programs", multiple=True, metavar="ENGINE=PATH", help="Where its program (or Python) is.")
@click.option("--together", is_flag=True, help="All engines stay up; else each has the machine alone in its turn.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="For engines that are started [a free one].")
@click.option("--start-timeout", type=ABOVE_0, default=900.0, show_default=True, help="Seconds until one must serve.")
@click.option("--request-timeout", type=ABOVE_0, default=600.0, show_default=True, help="Seconds without a byte.")
@click.option("--price", type=ABOVE_0, help="USD per hour of this machine, for the cost of a million tokens.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("septet-bench"),
              show_default=True, help="Folder for results.json, report.html and report.md.")  # fmt: skip
@click.pass_context
def bench(ctx: click.Context, **given: Any) -> None:
    """Measure engines on workloads, over HTTP like any client.

    \b
    septet bench --target septet:smollm2 --workload single
    septet bench --target septet --target llama.cpp --workload all --scale 0.25
    septet bench compare before/results.json after/results.json --threshold 5
    """
    if ctx.invoked_subcommand is None:
        _measure(given)


def _measure(given: dict[str, Any]) -> None:
    from septet.bench.harness.head import head
    from septet.bench.harness.interrupt import caught
    from septet.bench.harness.measure import Measurement
    from septet.bench.harness.report import write_reports
    from septet.bench.harness.results import Results

    workloads = _workloads(given)
    targets = _targets(given, workloads)
    out: Path = given["out"]
    out.mkdir(parents=True, exist_ok=True)
    launched = [t for t in targets if t.command]
    first = head(seed=given["seed"], rounds=given["rounds"], scale=given["scale"], price=given["price"],
                 ours=bool(launched))  # fmt: skip
    results = Results(first)
    limits = _limits(launched, first["machine"].get("gpu"), results)
    first["limits"] = {name: limit.data() for name, limit in limits.items()}
    with caught() as signals, _shown() as progress:
        measurement = Measurement(
            targets, workloads, results, out / "results.json", rounds=given["rounds"], seed=given["seed"],
            port=given["port"], together=given["together"], wait_s=given["start_timeout"],
            timeout_s=given["request_timeout"], limits=limits, progress=progress,
        )  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt):
            measurement.run()
        document = results.document()
        write_reports(document, out)
    _say(document, out)
    if signals.number:
        click.echo("interrupted: what was measured is kept", err=True)
        click.get_current_context().exit(128 + signals.number)
    if not document["points"]:
        raise click.ClickException("nothing was measured")
    if document["partial"]:
        raise click.ClickException("the results are partial")


def _limits(launched: list[Target], gpu: str | None, results: Results) -> dict[str, Limit]:
    """By target, of engines that run here; what is not known is a note."""
    from septet.bench.harness.limits import find

    known: dict[str, Limit] = {}
    for one in launched:
        found = find(one.model, gpu)
        if isinstance(found, str):
            results.note(found)
        else:
            known[one.name] = found
    return known


def _targets(given: dict[str, Any], workloads: list[Workload]) -> list[Target]:
    import os

    from septet.bench.harness.targets import at_url, fitted, target

    programs, arguments = (
        _pairs(given[name], option) for name, option in (("programs", "--program"), ("arguments", "--args"))
    )
    key = os.environ.get(given["api_key_env"] or "")
    found = [target(name, programs, arguments) for name in given["targets"]]
    found += [at_url(url, given["model"], key) for url in given["urls"]]
    found = found or [target("septet", programs, arguments)]
    if len({t.name for t in found}) < len(found):
        raise click.BadParameter("the same target twice", param_hint="--target")
    if given["together"] and given["port"] and sum(bool(t.command) for t in found) > 1:
        raise click.BadParameter("engines that stay up together can't share a port: leave it out", param_hint="--port")
    return [fitted(t, workloads) for t in found]


def _pairs(given: tuple[str, ...], option: str) -> dict[str, str]:
    if bad := [pair for pair in given if "=" not in pair]:
        raise click.BadParameter(f"{bad[0]!r} is not ENGINE=VALUE", param_hint=option)
    return {pair.partition("=")[0]: pair.partition("=")[2] for pair in given}


def _workloads(given: dict[str, Any]) -> list[Workload]:
    from dataclasses import replace

    from septet.advisor.arrivals import read_trace
    from septet.bench.harness.workload import load, names

    wanted = list(given["workloads"]) or (["replay"] if given["trace"] else ["single"])
    wanted = names() if wanted == ["all"] else wanted
    found = [load(name) for name in dict.fromkeys(wanted)]
    if given["trace"]:
        read_trace(given["trace"], scale=given["time_scale"])  # what is wrong with it is said now
        found = [
            replace(w, trace=given["trace"], stretch=given["time_scale"]) if w.kind == "trace" else w for w in found
        ]
    if given["streams"]:
        if fixed := [w.name for w in found if w.kind != "closed"]:
            line = f"closed workloads only; {', '.join(fixed)} keep{'s' * (len(fixed) == 1)} what the file says"
            if len(fixed) == len(found):
                raise click.BadParameter(line, param_hint="--streams")
            click.echo(f"--streams: {line}", err=True)
        try:
            counts = tuple(int(part) for part in given["streams"].split(","))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1 or max(counts) > 4096:
            raise click.BadParameter(
                f"{given['streams']!r}: numbers from 1 to 4096, with commas", param_hint="--streams"
            )
        found = [replace(w, streams=counts) if w.kind == "closed" else w for w in found]
        if given["scale"] != 1:
            raise click.BadParameter("numbers of streams are scaled too: give one of both", param_hint="--streams")
    return [w.scaled(given["scale"]) for w in found]


@contextlib.contextmanager
def _shown() -> Iterator[Progress]:
    """A bar of requests on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from septet.bench.harness.measure import Progress

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)

        class Shown(Progress):
            def state(self, line: str) -> None:
                bars.reset(task, description=line, total=None)

            def begin(self, line: str, requests: int) -> None:
                bars.reset(task, description=line, total=requests)
                if not console.is_terminal:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)

            def step(self) -> None:
                bars.advance(task)

            def warn(self, line: str) -> None:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield Shown()


def _say(document: dict[str, Any], out: Path) -> None:
    from septet.bench.harness.markdown import plain_lines

    for line in (*plain_lines(document), *(f"note: {note}" for note in document["notes"])):
        click.echo(line)
    click.echo(f"written: {out / 'report.html'}, {out / 'report.md'}, {out / 'results.json'}")


@bench.command("list")
def list_all() -> None:
    """Workloads, and the engines that this machine has."""
    from septet.bench.harness.targets import known, target
    from septet.bench.harness.workload import load, names

    for name in names():
        work = load(name)
        click.echo(f"{name:11} {work.about}")
    click.echo()
    for name, entry in known().items():
        found = target(f"{name}:{entry.get('model', 'MODEL')}", {}, {})
        click.echo(f"{name:13} {entry['title']:13} {found.missing or 'installed'}")


@bench.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("septet-bench"),
              show_default=True)  # fmt: skip
def report(results: Path, out: Path) -> None:
    """Draw the report of RESULTS (results.json) again."""
    from septet.bench.harness.document import read
    from septet.bench.harness.report import write_reports

    out.mkdir(parents=True, exist_ok=True)
    write_reports(read(results), out)
    click.echo(f"written: {out / 'report.html'}, {out / 'report.md'}")


@bench.command()
@click.argument("before", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--threshold", type=Finite(0), default=5.0, show_default=True, help="Percent.")
@click.option("--figure", "wanted", multiple=True, help="Compare this figure only, ttft_ms say; several [all].")
@click.option("--all", "every", is_flag=True, help="Show every figure.")
@click.pass_context
def compare(
    ctx: click.Context, before: Path, after: Path, threshold: float, wanted: tuple[str, ...], every: bool
) -> None:
    """What became worse from BEFORE to AFTER (results.json each).

    Worse is what changed by more than the threshold and whose intervals lie apart; figures of single runs can't tell.
    Code 1 if anything became worse or is gone.
    """
    from septet.bench.harness.compare import compare as changes_of
    from septet.bench.harness.document import read
    from septet.errors import InvalidRequest

    try:
        changes, gone, notes = changes_of(read(before), read(after), wanted)
    except InvalidRequest as error:
        raise click.UsageError(error.message) from None
    for note in notes:
        click.echo(f"note: {note}")
    for where in gone:
        click.echo(f"GONE {where}: no longer measured")
    verdicts = [(c, c.verdict(threshold)) for c in changes]
    for where in dict.fromkeys(c.where for c in changes):
        for word in ("worse", "can't tell", "better", *([""] if every else [])):
            mine = [c.line() for c, verdict in verdicts if c.where == where and verdict == word]
            if mine:
                shown = {"worse": "REGRESSION ", "better": "better ", "": "same ", "can't tell": "can't tell "}[word]
                click.echo(f"{shown}{where}: {', '.join(mine)}")
    worse, better, open_ = (
        sum(verdict == word for _, verdict in verdicts) for word in ("worse", "better", "can't tell")
    )
    more = f", {open_} changed that single runs can't tell" if open_ else ""
    click.echo(f"{len(changes)} figures: {worse} worse and {better} better by more than {threshold:g} %{more}")
    ctx.exit(1 if worse or gone else 0)


@bench.command()
@click.option("--results", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder with what "
              "Septet measured on a GPU [the checkout's benchmarks/results/h100].")  # fmt: skip
@click.option("--json", "as_json", is_flag=True)
def published(results: Path | None, as_json: bool) -> None:
    """Figures that others published, with their source and what is doubtful, beside Septet's nearest measurement."""
    import json

    from septet.bench.harness.published import amount, nearest, reference

    known = reference()
    measured = nearest(results or Path(__file__).parents[2] / "benchmarks" / "results" / "h100")
    if as_json:
        entries = [{**e, "septet_measured": measured.get(e["id"])} for e in known["entries"]]
        click.echo(json.dumps({**known, "entries": entries}, indent=1))
        return
    click.echo(f"{known['title']}, {known['date']}. {known['about']}\nIts sources: {known['sources']}.")
    table, said = "", None
    for e in [*known["entries"], None]:
        mine = measured.get(e["id"]) if e else None
        if said and mine != said:  # once for entries of one workload
            click.echo(f"    Septet measured {said}")
        said = mine
        if e is None:
            break
        if e["source"] != table:
            table = e["source"]
            click.echo(f"\n{table}")
        click.echo(f"  {e['engine']:16} {e['model']}, {e['hardware']}, {e['workload']}: {e['metric']} {amount(e)}")
        for flag in e["flags"]:
            click.echo(f"    ! {flag}")
