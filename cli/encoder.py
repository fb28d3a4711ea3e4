"""Commands on the weight encoder: fit one to the catalogue's adapters, judge it by those that it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..hub.errors import TargetExists
from . import options
from .settings import open_catalog

if TYPE_CHECKING:
    from ..hub.catalog import Catalog
    from ..index.fitting import Progress
    from ..index.own_encoder import Evaluation, Figures
    from ..index.weight_encoder import WeightEncoder

app = typer.Typer(
    help="The weight encoder: what adapters do, in the space of words.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def fit(
    base: options.Base = None,
    kind: Annotated[str, typer.Option(help="ridge, which takes seconds; autolora or w2t.")] = "ridge",
    steps: Annotated[int | None, typer.Option(help="Steps at most; it stops earlier where none helps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the fit.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="A sentence-transformers model instead of the packaged one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the encoder here; default: the home folder, to be used.")
    ] = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Fit an encoder to what the catalogue says of its adapters of a base; a fit that was stopped goes on."""
    from ..index.encoders.text import text
    from ..index.fitted import described, forget_stale
    from ..index.weight_encoder import encoder_path
    from . import show
    from .find import encoded

    if out and out.exists() and not force:
        raise TargetExists(f"{out}: exists already; choose another --out, or --force to replace it")
    with open_catalog() as catalog:
        base, shelf = described(catalog, base)
        facts: dict[str, Any] = {"base": base, "kind": kind, "described": len(shelf)}
        facts["out"] = str(out or encoder_path(catalog.home, base))
        if not dry_run:
            encoder = _fitted(catalog, base, kind, steps, seed, model, out, quiet=json)
            if out is None:
                forget_stale(catalog)
                encoded(catalog, text(model).space, quiet=json)
            told = {key: value for key, value in encoder.told.items() if key not in ("seen", "settings")}
            facts |= {"space": encoder.space, "seen": len(encoder.told["seen"]), **told}
    if json:
        show.as_json(facts)
    elif dry_run:
        show.line(f"would fit {kind} to {len(shelf)} adapters for {base} and write {facts['out']}")
    else:
        show.line(f"wrote {facts['out']}: {kind} for {base}, fitted to {facts['seen']} of {len(shelf)} adapters")
        show.line("how good it is: lorahub encoder evaluate")


def _fitted(
    catalog: Catalog,
    base: str,
    kind: str,
    steps: int | None,
    seed: int,
    model: str | None,
    out: Path | None,
    *,
    quiet: bool,
) -> WeightEncoder:
    from ..index.encoders.text import text
    from ..index.fitting import Settings
    from ..index.own_encoder import fit_own
    from . import show

    settings = Settings(seed=seed) if steps is None else Settings(seed=seed, steps=steps)
    with show.progress("fitting", quiet=quiet) as advance:
        encoder, _ = fit_own(
            catalog, text(model), base=base, kind=kind, settings=settings, out=out, progress=_told(advance)
        )
    return encoder


def _told(advance: Callable[[int, int | None], None]) -> Callable[[Progress], None]:
    return lambda at: advance(at.done, at.total)


@app.command()
def evaluate(
    base: options.Base = None,
    model: Annotated[
        str | None, typer.Option(help="A sentence-transformers model instead of the packaged one.")
    ] = None,
    encoder: Annotated[Path | None, typer.Option(help="An encoder's file; default: the catalogue's own.")] = None,
    folds: Annotated[
        int | None, typer.Option(min=1, help="Fits without a part of the adapters; default: 5 for ridge, else 1.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Judge an encoder by adapters that it was not fitted to: by new ones, or by fits without a part of the old."""
    from ..hub.errors import RetrievalError
    from ..index.encoders.text import text
    from ..index.fitted import described
    from ..index.own_encoder import evaluate as judge
    from ..index.weight_encoder import encoder_for, load_encoder
    from . import show

    with open_catalog() as catalog, show.progress("judging", quiet=json) as advance:
        found = load_encoder(encoder) if encoder else None
        if found is None:
            base, _ = described(catalog, base)
            found = encoder_for(catalog.home, base)
        if found is None:
            raise RetrievalError(f"there is no weight encoder for {base}; fit one with `lorahub encoder fit`")
        result = judge(catalog, found, text(model), folds=folds, progress=_told(advance))
    if json:
        show.as_json(asdict(result))
        return
    _print(result)


def _print(result: Evaluation) -> None:
    from . import show

    known = "fitted to others" if result.seen is not None else "it does not say to which it was fitted"
    if result.fits:
        known = f"left out of {result.fits} fit{'s' if result.fits > 1 else ''} like it"
    show.line(f"{result.kind} for {result.base}: {result.queries} queries among {result.pool} adapters ({known})")

    def row(name: str, figures: Figures) -> tuple[str, ...]:
        return (name, *(f"{share:.3f}" for share in figures.recall.values()), f"{figures.reciprocal_rank:.3f}")

    rows = [
        row("adapters by words", result.found), row("chance", result.chance),
        row("ceiling: their true descriptions", result.ceiling), row("words by adapters", result.named),
    ]  # fmt: skip
    show.table(["", *(f"recall@{depth}" for depth in result.found.recall), "reciprocal rank"], rows)
