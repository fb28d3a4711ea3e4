"""The Typer app: commands are registered here, errors become exit codes here."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from ..hub.errors import LoraHubError
from . import analyze, combine, compress, describe, encoder, files, find, generator, imagine, library, make, map, tour

INTERRUPTED = 130

app = typer.Typer(
    name="lorahub",
    help="Find, merge and generate LoRA adapters: exactly, on files, on a CPU, offline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    library.add,
    library.list_,
    library.show,
    library.tag,
    library.remove,
    library.verify,
    find.search,
    find.similar,
    describe.describe,
    map.map_,
    files.inspect,
    files.check,
    analyze.analyze,
    combine.merge,
    compress.compress,
    files.convert,
    make.generate,
    imagine.imagine,
    tour.demo,
):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(encoder.app, name="encoder")
app.add_typer(generator.app, name="generator")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"lorahub {version('lorahub-kit')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find, merge and generate LoRA adapters: exactly, on files, on a CPU, offline."""


def run() -> None:
    """The console script: run a command, turn what it raises into one line and an exit code."""
    signal.signal(signal.SIGINT, _interrupted)
    # threads that wait by spinning make every command many times slower on a machine that is busy
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except LoraHubError as error:
        from .show import note

        note(f"lorahub: {' '.join(str(error).split())}")
        sys.exit(error.exit_code)


def _interrupted(signum: int, frame: object) -> None:
    """Ctrl-C ends the program through its clean-up, with the code that shells expect."""
    sys.exit(INTERRUPTED)
