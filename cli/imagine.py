"""The imagine command: a prompt, the adapters that it asks for, and a picture painted with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..hub.errors import BadOption
from . import options
from .settings import open_catalog

MOST = 64  # pictures in a grid


@dataclass(frozen=True)
class Request:
    """What the user asked for; None where the choice is ours."""

    prompt: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    limit: int
    mode: str
    fuse: str | None
    gates: Path | None
    pipeline: Path | None
    base: str | None
    steps: int | None
    guidance: float | None
    seed: int
    grid: int
    compare: bool
    triggers: bool
    device: str
    dtype: str | None
    allow_pickle: bool
    quiet: bool
    passes: Sequence[Sequence[float]] | None = None  # of a composition, from a recipe

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= MOST:
            raise BadOption(f"--grid is {self.grid}; expected 1 to {MOST} pictures")
        if self.steps is not None and self.steps < 1:
            raise BadOption(f"--steps is {self.steps}; expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise BadOption(f"--seed is {self.seed}; expected a number from 0 to 2^63 - 1")

    @property
    def searches(self) -> bool:
        """Whether adapters are looked for in the catalogue."""
        return not self.adapters and self.limit > 0

    @property
    def seeds(self) -> list[int]:
        return [self.seed + number for number in range(self.grid)]


def imagine(
    out: options.Out,
    prompt: Annotated[str | None, typer.Argument(help="What the picture should show, and how.")] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapters", metavar="REF", help="Paint with this one, REF:0.7 for a weight; may be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many adapters to find at most; 0 for the base's own picture.")] = 3,
    mode: Annotated[
        str, typer.Option(help="How to find adapters: hybrid, text (names and words), meaning or weights.")
    ] = "hybrid",
    weight: options.Weights = None,
    fuse: Annotated[
        str | None,
        typer.Option(
            help="composed, gated or sum; default: gated where this base has gates, composed on the built-in base where"
            " some adapters are tagged style and some are not."
        ),
    ] = None,
    gates: Annotated[Path | None, typer.Option(help="Gates to use instead of those that lie with the base.")] = None,
    pipeline: Annotated[
        Path | None, typer.Option(help="Folder of a diffusers pipeline; default: the built-in picture base.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Your word for which base model the pipeline is.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; default: the pipeline's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance; default: the pipeline's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    grid: Annotated[int, typer.Option(help="How many pictures, with one seed after the other, on a sheet.")] = 1,
    compare: Annotated[
        bool, typer.Option("--compare", help="A sheet of the base, each adapter alone, their sum, and the fusion.")
    ] = False,
    triggers: Annotated[
        bool, typer.Option("--triggers", help="Append the adapters' trigger words that the prompt lacks.")
    ] = False,
    again: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Paint this picture's recipe again, in place of a prompt.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or another of torch's devices.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, the default; float16 or bfloat16 on a GPU.")] = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Paint a picture: find the adapters that the prompt asks for, fuse them at run time, write a PNG."""
    from .canvas import Target, carry_out, recalled

    if (prompt is None) == (again is None):
        raise BadOption("expected a prompt, or --again PNG to paint a picture's recipe again, and not both")
    if out.suffix.lower() != ".png":
        raise BadOption(f"--out is {out}; expected a name that ends in .png, because the recipe is kept in the file")
    request = Request(
        prompt or "", tuple(adapters or ()), tuple(weight or ()), limit, mode, fuse, gates, pipeline, base, steps,
        guidance, seed, grid, compare, triggers, device, dtype, allow_pickle, json,
    )  # fmt: skip
    with open_catalog() as catalog:
        facts = carry_out(catalog, recalled(request, again) if again else request, Target(out, force, dry_run))
    _print(facts, json=json)


def _print(facts: Mapping[str, Any], *, json: bool) -> None:
    from . import show

    _remark(facts)
    if json:
        show.as_json(facts)
        return
    adapters = " ".join(f"{one['weight']:+g}*{one['name']}" for one in facts["adapters"])
    how = f"{facts['fuse']} of {adapters} ({facts['reason']})" if adapters else "the base's own picture"
    seeds = facts["seeds"]
    numbers = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    if facts["seconds"] is None:
        show.line(f"would paint {facts['out']}: {how}, {numbers}, {facts['steps']} steps")
    else:
        show.line(f"painted {facts['out']}: {how}, {numbers}, {facts['steps']} steps, {facts['seconds']:.1f} s")
    for one in facts["adapters"]:
        if one["why"]:
            show.line(f"  {one['name']}: {'; '.join(one['why'][:3])}")


def _remark(facts: Mapping[str, Any]) -> None:
    """One line each on stderr: what was left out, what is painted without, which trigger words are missing."""
    from ..generate.choosing import UNASKED
    from . import show

    refused = [one for one in facts["left_out"] if one["reason"] != UNASKED]
    rest = len(facts["left_out"]) - len(refused)
    if not facts["adapters"] and facts["searched"]:
        show.note("no adapter for this base is asked for by the prompt: this is the base's own picture")
    if refused:
        named = "; ".join(f"{one['name']} ({one['reason']})" for one in refused[:3])
        more = [f"{len(refused) - 3} others"] * (len(refused) > 3) + [f"{rest} that the prompt does not ask for"] * (
            rest > 0
        )
        show.note(f"left out: {named}{'; and ' + ' and '.join(more) if more else ''}")
    for one in facts["adapters"]:
        if one["aside"]:
            show.note(f"{one['name']} also changes {', '.join(one['aside'])}: these changes are not painted with")
    lacking = [f"{trigger!r} ({one['name']})" for one in facts["adapters"] for trigger in one["lacking_triggers"][:3]]
    if lacking:
        show.note(f"trigger words that the prompt lacks: {', '.join(lacking[:4])}; --triggers appends them")
