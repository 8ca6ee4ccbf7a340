"""`septet bench`: measure engines on workloads, over HTTP like any client; compare and show what was measured.

Holds the options and the progress shown; the measurement is `septet.bench.harness`.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from septet.bench.harness.measure import Progress
    from septet.bench.harness.targets import Target
    from septet.bench.harness.workload import Workload

__all__ = ["bench"]


@click.group(invoke_without_command=True)
@click.option("--target", "targets", multiple=True, metavar="ENGINE[:MODEL]", help="septet, vllm, sglang, trtllm, "
              "llama.cpp, ollama, lmdeploy, tgi or transformers; several are alternated [septet:smollm2].")  # fmt: skip
@click.option("--url", "urls", multiple=True, help="A server that runs already (OpenAI's API).")
@click.option("--model", help="The model's name at --url [the first it lists].")
@click.option("--api-key-env", metavar="NAME", help="Environment variable with the key for --url.")
@click.option("--workload", "workloads", multiple=True, help="By name (septet bench list) or a .toml file; several, "
              "or all [single].")  # fmt: skip
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Replay this file.")
@click.option("--time-scale", type=float, default=1.0, show_default=True, help="Of its times: 0.001 where they are ms.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True)
@click.option("--scale", type=float, default=1.0, show_default=True, help="Shrink workloads for a small machine.")
@click.option("--streams", help="Other numbers of streams, with commas.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--args", "arguments", multiple=True, metavar="ENGINE=ARGS", help="More of its command line.")
@click.option("--program", "programs", multiple=True, metavar="ENGINE=PATH", help="Where its program (or Python) is.")
@click.option("--together", is_flag=True, help="All engines stay up; else each has the machine alone in its turn.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="For engines that are started [a free one].")
@click.option("--start-timeout", type=float, default=900.0, show_default=True, help="Seconds until one must serve.")
@click.option("--request-timeout", type=float, default=600.0, show_default=True, help="Seconds without a byte.")
@click.option("--price", type=float, help="USD per hour of this machine, for the cost of a million tokens.")
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
    _needs("httpx", "psutil")
    from septet.bench.harness.head import head
    from septet.bench.harness.limits import Limit, find
    from septet.bench.harness.measure import Measurement
    from septet.bench.harness.report import write_reports
    from septet.bench.harness.results import Results

    targets, workloads = _targets(given), _workloads(given)
    out: Path = given["out"]
    out.mkdir(parents=True, exist_ok=True)
    first = head(seed=given["seed"], rounds=given["rounds"], scale=given["scale"], price=given["price"])
    results = Results(first)
    limit = find(next((t.model for t in targets if t.command), ""), first["machine"].get("gpu"))
    if isinstance(limit, Limit):
        first["limit"] = limit.data()
    else:
        results.note(limit)
    with _shown() as progress, _terminable():
        measurement = Measurement(
            targets, workloads, results, out / "results.json", rounds=given["rounds"], seed=given["seed"],
            port=given["port"], together=given["together"], wait_s=given["start_timeout"],
            timeout_s=given["request_timeout"], limit=limit if isinstance(limit, Limit) else None, progress=progress,
        )  # fmt: skip
        try:
            measurement.run()
        finally:
            document = results.document()
            write_reports(document, out)
    _say(document, out)
    if not document["points"]:
        raise click.ClickException("nothing was measured")
    if document["partial"]:
        raise click.ClickException("the results are partial")


def _needs(*modules: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in modules if find_spec(name) is None]:
        raise click.ClickException(f"septet bench needs {' and '.join(missing)}: pip install 'septet[bench]'")


def _targets(given: dict[str, Any]) -> list[Target]:
    import os

    from septet.bench.harness.targets import at_url, target

    programs, arguments = (
        _pairs(given[name], option) for name, option in (("programs", "--program"), ("arguments", "--args"))
    )
    key = os.environ.get(given["api_key_env"] or "")
    found = [target(name, programs, arguments) for name in given["targets"]]
    found += [at_url(url, given["model"], key) for url in given["urls"]]
    found = found or [target("septet", programs, arguments)]
    if len({t.name for t in found}) < len(found):
        raise click.BadParameter("the same target twice", param_hint="--target")
    return found


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


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a measurement as Ctrl-C does: engines are stopped, results are kept."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(document: dict[str, Any], out: Path) -> None:
    from septet.bench.harness.markdown import plain_lines

    click.echo("\n".join(plain_lines(document)))
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
    from septet.bench.harness.report import write_reports
    from septet.bench.harness.results import read

    out.mkdir(parents=True, exist_ok=True)
    write_reports(read(results), out)
    click.echo(f"written: {out / 'report.html'}, {out / 'report.md'}")


@bench.command()
@click.argument("before", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--threshold", type=click.FloatRange(0), default=5.0, show_default=True, help="Percent.")
@click.option("--ignore-overlapping", is_flag=True, help="Changes whose intervals overlap are no regressions.")
@click.option("--all", "every", is_flag=True, help="Show every figure.")
@click.pass_context
def compare(
    ctx: click.Context, before: Path, after: Path, threshold: float, ignore_overlapping: bool, every: bool
) -> None:
    """What became worse from BEFORE to AFTER (results.json each); code 1 if anything did by more than the threshold."""
    from septet.bench.harness.compare import compare as changes_of
    from septet.bench.harness.results import read
    from septet.errors import InvalidRequest

    try:
        changes, notes = changes_of(read(before), read(after))
    except InvalidRequest as error:
        raise click.UsageError(error.message) from None
    worse = [c for c in changes if c.worse > threshold and not (ignore_overlapping and c.overlap)]
    better = [c for c in changes if c.worse < -threshold]
    for note in notes:
        click.echo(f"note: {note}")
    for change in changes if every else [*worse, *better]:
        click.echo(f"{'REGRESSION ' if change in worse else ''}{change.line()}")
    click.echo(f"{len(changes)} figures: {len(worse)} worse and {len(better)} better by more than {threshold:g} %")
    ctx.exit(1 if worse else 0)


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
    table = ""
    for e in known["entries"]:
        if e["source"] != table:
            table = e["source"]
            click.echo(f"\n{table}")
        click.echo(f"  {e['engine']:16} {e['model']}, {e['hardware']}, {e['workload']}: {e['metric']} {amount(e)}")
        for flag in e["flags"]:
            click.echo(f"    ! {flag}")
        if e["id"] in measured:
            click.echo(f"    Septet measured {measured[e['id']]}")
