"""The command `mole`: names, help and errors. What a command does is in `commands/`.

A command is a module of `commands/` with one function of the same name; it is imported after the
command line has been read, so `mole --help` stays fast. The line shown in the list of commands
is written here, because reading it from the module would import it.
"""

import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lookup_experts import __version__
from lookup_experts.errors import UserError, unknown_name

COMMANDS = {
    "demo": "The whole story on text found on this machine: train, fold, read from disk, compare.",
    "prepare": "Turn text into token shards for training.",
    "train": "Train a recipe from scratch; resumes where it stopped.",
    "upcycle": "Train lookup experts on an existing model; resumes where it stopped.",
    "reparameterize": "Fold the trained experts into a table on disk.",
    "offload": "Put the embeddings of a released model into tables on disk.",
    "reencode": "Write a table again in another encoding.",
    "inspect": "Tell what is in a model folder or a table.",
    "verify": "Check that a table is intact and belongs to its model.",
    "generate": "Continue a prompt, token by token.",
    "chat": "Talk to a model.",
    "serve": "Serve a model by OpenAI's API, with a page that shows what its experts do.",
    "eval": "Score models: the paper's tasks, perplexity of a text, recall.",
    "bench": "Measure decoding, prompts, disk, training, quality, latency and serving here.",
}

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class LazyCommands(TyperGroup):
    """A group that imports a command's module only when that command is about to run."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What help and completion need: the name and its line."""
        line = COMMANDS.get(cmd_name)
        return None if line is None else TyperCommand(cmd_name, help=line)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS:
            raise unknown_name("command", args[0], COMMANDS)
        return args[0], load_command(args[0]), args[1:]


def load_command(name: str) -> Any:
    """The real command: the function of that name in its module, or a group `app` of several."""
    module = importlib.import_module(f"lookup_experts.commands.{name}")
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    single = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    single.command(name)(getattr(module, name))
    return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyCommands,
    name="mole",
    help="Language models with lookup experts: train, fold into a table, read it from disk.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mole {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Language models with lookup experts: train, fold into a table, read it from disk."""


def main() -> None:
    """Run the command line; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"mole: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        if os.environ.get("MOLE_TRACEBACK"):
            raise
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("mole: interrupted.", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
