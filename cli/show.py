"""Output: results on stdout (tables, or pure JSON), progress and notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer


def as_json(data: Any) -> None:
    """Print plain data as JSON and nothing else; numbers that JSON lacks become null."""
    print(json.dumps(_plain(data), indent=2, ensure_ascii=False, default=str))  # noqa: T201


def _plain(data: Any) -> Any:
    if isinstance(data, float):
        return data if data == data and abs(data) != float("inf") else None
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [_plain(value) for value in data]
    return data


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print rows under column heads; wide cells fold when stdout is a terminal, else lines stay whole."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    grid = Table(box=SIMPLE_HEAD, title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell(value)) for value in row))
    console.print(grid)


def printable(text: str) -> str:
    """Text without the characters that would command a terminal: a file's own words may hold any."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text)


def cell(value: object) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value) or "-"
    return printable(str(value))


def base_name(base: str | None) -> str | None:
    """A base's name without its owner, as tables show it."""
    return base.rstrip("/").rsplit("/", 1)[-1] if base else None


def fields(data: Mapping[str, object]) -> None:
    """Print names and values, one pair a line; empty values are left out."""
    width = max((len(key) for key in data), default=0)
    for key, value in data.items():
        if value not in (None, "", (), [], {}):
            line(f"{key.ljust(width)}  {cell(value)}")


def line(text: str = "") -> None:
    """Print a line of results."""
    typer.echo(printable(text))


def note(text: str) -> None:
    """Print a remark on stderr, where it disturbs no pipe."""
    typer.echo(printable(text), err=True)


@contextmanager
def progress(text: str, *, quiet: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr; the yielded function takes how many are done and how many there are (None: unknown).

    Nothing is drawn when stderr is no terminal or `quiet` is set.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
