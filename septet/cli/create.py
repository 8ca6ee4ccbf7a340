"""`septet create NAME -f Modelfile`: a model of one's own, made of another one's weights.

Works on the store itself, with or without a server running. Progress on standard error, the result on standard output.
"""

from __future__ import annotations

from pathlib import Path

import click

from septet.errors import InvalidRequest

__all__ = ["create"]


@click.command()
@click.argument("name")
@click.option(
    "-f", "--file", "path", type=click.Path(dir_okay=False), default="Modelfile", show_default=True, help="Modelfile."
)
def create(name: str, path: str) -> None:
    """Create the model NAME from a Modelfile: FROM, PARAMETER, TEMPLATE, SYSTEM, MESSAGE, LICENSE (docs/models.md)."""
    from septet.cli.hub import progress_bar
    from septet.hub.create import create as create_model
    from septet.hub.create import new_name
    from septet.hub.modelfile import MAX_BYTES, parse
    from septet.session.preset import check_template

    new_name(name)
    try:
        with Path(path).open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        modelfile = parse(raw.decode("utf-8"))
    except OSError as error:
        raise InvalidRequest(f"can't read {path}: {error.strerror or error}; give another with -f", param="f") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8: {error}", param="f") from None
    if modelfile.recipe.template is not None:
        check_template(modelfile.recipe.template)
    with progress_bar() as progress:
        model = create_model(name, _base(modelfile.base, Path(path).parent), modelfile.recipe, progress=progress)
    click.echo(f"{model.name} is made of {modelfile.base}; try: septet run {model.name}")


def _base(base: str, directory: Path) -> str:
    """A path in FROM is meant from where the Modelfile lies."""
    beside = directory / Path(base).expanduser()
    looks_like_a_path = base.startswith((".", "/", "~")) or base.endswith(".gguf")
    return str(beside) if looks_like_a_path and beside.exists() else base
