"""Options and arguments that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ..hub.errors import BadOption

Ref = Annotated[str, typer.Argument(metavar="REF", help="A name, the beginning of an id, or a path.")]
Refs = Annotated[
    list[str],
    typer.Argument(metavar="REF", help="Names, ids or paths; REF:0.7 gives a weight, also a negative one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Base = Annotated[str | None, typer.Option("--base", help="The base model's name.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Also read .bin and .pt files (pickles, weights only): trust them first.")
]
Out = Annotated[Path, typer.Option("--out", help="Where to write the result.")]
To = Annotated[str | None, typer.Option("--to", help="peft, diffusers or kohya; default: what fits the modules.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Insist = Annotated[
    bool,
    typer.Option("--force", help="Replace an existing output, and make one even where nothing is close; recorded."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; default: the inputs'.")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="alpha for files that do not store one.")]
Method = Annotated[list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="An option of the method.")]
Label = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME: MEANING",
        help="A label that sentences are to be sorted under, and what belongs there; may be repeated. The adapter then "
        "rehearses these words on the packaged sentence model.",
    ),
]
Labels = Annotated[Path | None, typer.Option(metavar="FILE", help="Such labels in a file, one a line.")]
Weights = Annotated[
    list[float] | None, typer.Option("--weight", "-w", help="Weights in the adapters' order, or one for all.")
]
Where = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB=W,W", help="Other weights for the modules that a glob names, '*.mlp.*=1,0.5'."),
]
Extras = Annotated[str, typer.Option(help="Biases, heads and embeddings: refuse, drop, first or average.")]
Word = Annotated[str | None, typer.Option("--base", help="Your word that all are for this base.")]
Optimize = Annotated[
    str | None,
    typer.Option(metavar="COMMAND", help="Search weights: 'score.py {}' prints how good the adapter at {} is."),
]
Limit = Annotated[int, typer.Option("--limit", help="How many to show.")]


def pairs(texts: list[str] | None) -> dict[str, str]:
    """`key=value` texts as a table. Raises BadOption for one without `=`."""
    table = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise BadOption(f"-o {text!r}: expected KEY=VALUE, such as -o density=0.3")
        table[key.strip().replace("-", "_")] = value.strip()
    return table


def weight_lists(texts: list[str] | None) -> dict[str, list[float]]:
    """`glob=0.5,1` texts as a table. Raises BadOption for one that is no glob with finite numbers."""
    table = {}
    for text in texts or []:
        glob, _, numbers = text.rpartition("=")
        try:
            table[glob] = [float(number) for number in numbers.split(",")]
        except ValueError:
            table[glob] = [math.nan]
        if not glob or not all(math.isfinite(weight) for weight in table[glob]):
            raise BadOption(
                f"--where {text!r}: expected GLOB=W,W with a number for each adapter, such as '*.mlp.*=1,0'"
            )
    return table
