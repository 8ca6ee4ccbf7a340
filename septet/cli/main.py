"""`septet`: the command group. Each command lives in a file of its own and is imported only when it is called.

The entry point of the package. Turns every `SeptetError` into one line on standard error and exit code 1; shows no
traceback for what is the user's to mend. Holds no logic of its own.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from septet.errors import SeptetError

__all__ = ["main"]

INTERRUPTED = 130  # the shell's code for what Ctrl-C has ended

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("septet.cli.run:run", "Ask a model one question, or chat with it."),
    "serve": ("septet.cli.serve:serve", "Serve models over HTTP (the APIs of OpenAI, Ollama and others)."),
    "pull": ("septet.cli.hub:pull", "Fetch a model into the store."),
    "list": ("septet.cli.hub:list_models", "List the models in the store and those that can be pulled by name."),
    "show": ("septet.cli.hub:show", "Show what a model is: source, licence, files, shape."),
    "key": ("septet.cli.keys:key", "Make an API key for the server."),
    "doctor": ("septet.cli.doctor:doctor", "Show the machine, the kernels it gets, and what speed to expect."),
    "advise": ("septet.cli.advise:advise", "Which engine and settings for a workload, and what that rests on."),
    "plan": ("septet.cli.plan:plan", "Plan capacity: devices, arrangement and cost for so many users."),
    "simulate": ("septet.cli.simulate:simulate", "Simulate a workload on a fleet, with the real scheduler."),
    "bench": ("septet.cli.bench:bench", "Measure engines on workloads, over HTTP like any client; compare results."),
    "create": ("septet.cli.create:create", "Create a model from a Modelfile."),
    "ps": ("septet.cli.remote:ps", "List the models that a running server has loaded."),
    "stop": ("septet.cli.remote:stop", "Unload a model from a running server."),
    "rm": ("septet.cli.hub:rm", "Remove models from the store."),
}
"""name -> (import path, one line for --help, so that help imports nothing)."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SeptetError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="septet")
def main() -> None:
    """Septet: run and serve language models on this machine."""


if __name__ == "__main__":
    main()
