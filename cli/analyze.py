"""The analyze command: how adapters stand to each other, and which merging method to try first."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, show
from .settings import algebra_on_one_thread, open_catalog

if TYPE_CHECKING:
    from ..merge.advise import Advice
    from ..merge.analyze import Analysis
    from ..merge.compare import Overlap, Relation

SHOWN_PAIRS = 20
SHOWN_LAYERS = 3


def analyze(
    refs: options.Refs,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", "-w", help="Weights in the adapters' order, or one for all.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw heat maps into this PNG file.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="A table of every layer.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sample in which signs of large deltas are counted.")] = 0,
    base: Annotated[str | None, typer.Option("--base", help="Your word that all are for this base.")] = None,
    alpha: options.Alpha = None,
    allow_pickle: options.AllowPickle = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing picture.")] = False,
    json: options.Json = False,
) -> None:
    """Compare adapters: cosines, shared subspaces, sign conflict, by layer; say which merging method to try first."""
    from ..merge.advise import advise
    from ..merge.analyze import analyze as analyze_adapters
    from .plot import check_target, save_plot
    from .refs import find, load, weights_of

    algebra_on_one_thread()
    if plot:
        check_target(plot, force=force)
    names, weights = weights_of(refs, weight or [])
    with open_catalog() as catalog:
        adapters = [load(find(catalog, name), allow_pickle=allow_pickle, alpha=alpha) for name in names]
    for adapter in adapters:
        if adapter.extras:
            show.note(f"{adapter.name}: {len(adapter.extras)} tensors that are no low-rank deltas are not looked at")
    with show.progress("comparing", quiet=json) as advance:
        found = analyze_adapters(adapters, weights, base=base, seed=seed, progress=advance)
    advice = advise(found)
    if plot:
        save_plot(found, plot, force=force)
    if json:
        show.as_json({**asdict(found), "advice": asdict(advice), "plot": str(plot) if plot else None})
        return
    _print(found, layers=layers)
    _print_advice(advice, refs=names)
    if plot:
        show.line(f"drew {plot}")


def _print(found: Analysis, *, layers: bool) -> None:
    show.table(
        ["adapter", "weight", "modules", "norm", "rank", "stable rank", "rank for 90 %", "for 99 % of squared norm"],
        [
            (one.name, one.weight, one.modules, one.norm, one.rank, one.stable_rank, one.rank_90, one.rank_99)
            for one in found.adapters
        ],
    )
    if found.pairs:
        show.line()
        _print_pairs(found)
        show.line(
            f"interference {show.cell(found.interference)}: squared norm of the sum over the sum of squared norms "
            f"(1 where orthogonal, {len(found.adapters)} for copies, 0 where they cancel)"
        )
    if layers:
        show.line()
        _print_layers(found)
    elif len(found.layers) > SHOWN_LAYERS and found.pairs:
        _print_extremes(found)


def _print_pairs(found: Analysis) -> None:
    shown = sorted(found.pairs, key=lambda pair: -abs(pair.whole.cosine))[:SHOWN_PAIRS]
    show.table(
        ["pair", "cosine", "norm ratio", "outputs (chance)", "inputs (chance)", "signs differ", "of shared size"],
        [
            (
                f"{pair.first} | {pair.second}",
                f"{pair.whole.cosine:.4f}",
                pair.whole.norm_ratio,
                _overlap(pair.whole.outputs),
                _overlap(pair.whole.inputs),
                _share(pair.whole.conflict, pair.whole.conflict_error) if pair.whole.modules else "-",
                _share(pair.whole.clash, pair.whole.clash_error),
            )
            for pair in shown
        ],
    )
    if len(found.pairs) > len(shown):
        show.line(f"and {len(found.pairs) - len(shown)} pairs of smaller cosine; --json has all")
    if found.sampled:
        show.line(f"signs of {found.sampled} modules: counted in a sample of their entries, +- its standard error")


def _overlap(found: Overlap | None) -> str:
    return f"{found.value:.3f} ({found.chance:.3f})" if found else "-"


def _share(value: float | None, error: float) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} +- {error:.3f}" if error else f"{value:.3f}"


def _print_layers(found: Analysis) -> None:
    whole = sum(norm**2 for layer in found.layers for norm in layer.norms) or 1.0
    rows = []
    for layer in found.layers:
        relations = [pair.layers[layer.name] for pair in found.pairs if layer.name in pair.layers]
        share = sum(norm**2 for norm in layer.norms) / whole
        rows.append((layer.name, layer.modules, f"{100 * share:.1f} %", *_layer_cells(layer.interference, relations)))
    heads = ["layer", "modules", "squared norm"]
    if found.pairs:
        heads += ["interference", "cosines", "outputs (chance)", "inputs (chance)", "most clash"]
    width = len(heads)
    show.table(heads, [row[:width] for row in rows])


def _layer_cells(interference: float | None, relations: Sequence[Relation]) -> list[object]:
    cosines = [one.cosine for one in relations]
    clashes = [one.clash for one in relations if one.clash is not None]
    return [
        interference,
        f"{min(cosines):.3f} to {max(cosines):.3f}"
        if len(cosines) > 1
        else "".join(f"{c:.3f}" for c in cosines) or "-",
        _mean_overlap(one.outputs for one in relations),
        _mean_overlap(one.inputs for one in relations),
        f"{max(clashes):.3f}" if clashes else "-",
    ]


def _mean_overlap(overlaps: Iterable[Overlap | None]) -> str:
    known = [one for one in overlaps if one]
    if not known:
        return "-"
    return f"{sum(o.value for o in known) / len(known):.3f} ({sum(o.chance for o in known) / len(known):.3f})"


def _print_extremes(found: Analysis) -> None:
    """The layers whose interference lies furthest from none."""
    known = [(layer, layer.interference) for layer in found.layers if layer.interference is not None]
    furthest = sorted(known, key=lambda item: -abs(item[1] - 1))[:SHOWN_LAYERS]
    told = ", ".join(f"{layer.name} {value:.3g}" for layer, value in furthest)
    show.line(f"furthest from orthogonal: {told} (--layers shows all)")


def _print_advice(advice: Advice, refs: Sequence[str]) -> None:
    show.line(f"\nexpected best: {advice.method}, because {advice.reason}")
    for caution in advice.cautions:
        show.line(f"mind: {caution}")
    if len(refs) > 1:
        weighted = [ref if w == 1 else f"{ref}:{w:.4g}" for ref, w in zip(refs, advice.weights, strict=True)]
        chosen = [f"-o {key}={value}" for key, value in advice.options.items()]
        command = ["lorahub merge", *(shlex.quote(ref) for ref in weighted), f"--method {advice.method}", *chosen]
        show.line(f"try: {' '.join(command)} --out PATH; then measure it on your task")
