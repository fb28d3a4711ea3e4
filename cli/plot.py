"""Pictures of an analysis, as PNG."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..hub.errors import BadOption, TargetExists
from .show import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..merge.analyze import Analysis, Pair
    from ..merge.compare import Relation

NAMED_PAIRS = 15  # up to so many pairs have a column each; of more, each adapter has the mean over its pairs
LABELS = 40  # layers named at most; more are named at intervals
NUMBERED = 12  # up to so many adapters, cosines are written into their squares


def check_target(path: Path, *, force: bool) -> None:
    """Raise, before any work, BadOption for a file that is no PNG, TargetExists for one that must not be replaced."""
    if path.suffix.lower() != ".png":
        raise BadOption(f"--plot {path}: the picture is a PNG; give a name that ends in .png")
    if path.exists() and not force:
        raise TargetExists(f"{path}: exists already; choose another --plot, or --force to replace it")


def save_plot(analysis: Analysis, path: Path, *, force: bool = False) -> Path:
    """Draw the analysis into a PNG: heat maps of two or more adapters, norms and ranks of one. Replaces atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..hub.writing import replacing

    check_target(path, force=force)
    figure = Figure(dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name's sign that the font lacks becomes a box
        _draw_pairs(figure, analysis) if analysis.pairs else _draw_one(figure, analysis)
        with replacing(path, force=True) as place:
            figure.savefig(place, format="png")
    return path


def shortened(names: Sequence[str], most: int = 18) -> list[str]:
    """Names of at most `most` characters that stay different: the middle goes first."""
    head = (most - 1) // 2
    cut = [name if len(name) <= most else f"{name[:head]}…{name[head + 1 - most :]}" for name in map(printable, names)]
    marked = [f"{name[: most - 3]} {i}" if cut.count(name) > 1 else name for i, name in enumerate(cut, 1)]
    return [name.replace("$", r"\$") for name in marked]  # matplotlib sees a formula between two of them


def _draw_pairs(figure: Figure, analysis: Analysis) -> None:
    count, layers = len(analysis.adapters), [layer.name for layer in analysis.layers]
    columns = len(analysis.pairs) if len(analysis.pairs) <= NAMED_PAIRS else count
    square, strip = 3.0 + 0.3 * count, 2.2 + 0.2 * columns
    figure.set_size_inches(square + 3 * strip, max(4.5, square, 2.5 + 0.2 * min(len(layers), LABELS)))
    axes = figure.subplots(1, 4, width_ratios=[square, strip, strip, strip])
    _draw_matrix(axes[0], analysis)
    readings: tuple[tuple[str, Callable[[Relation], float | None]], ...] = (
        ("cosine", lambda one: one.cosine),
        ("overlap of outputs", lambda one: one.outputs.value if one.outputs else None),
        ("overlap of inputs", lambda one: one.inputs.value if one.inputs else None),
    )
    for axis, (title, reading) in zip(axes[1:], readings, strict=True):
        _draw_layers(axis, analysis, layers, title, reading)
    for axis in axes[2:]:  # the rows are those of the map on their left
        axis.set_yticklabels([])
        axis.set_ylabel("")


def _draw_matrix(axis: Axes, analysis: Analysis) -> None:
    names = shortened([one.name for one in analysis.adapters])
    place = {one.name: i for i, one in enumerate(analysis.adapters)}
    cosines = [[float(i == j) for j in place.values()] for i in place.values()]
    for pair in analysis.pairs:
        i, j = place[pair.first], place[pair.second]
        cosines[i][j] = cosines[j][i] = pair.whole.cosine
    _heat(axis, cosines, names, names, "cosine of the deltas", (-1.0, 1.0), "RdBu_r")
    axis.set_aspect("equal")
    if len(names) <= NUMBERED:
        for i, row in enumerate(cosines):
            for j, cosine in enumerate(row):
                colour = "white" if abs(cosine) > 0.6 else "black"
                axis.text(
                    j, i, f"{cosine:.2f}".replace("-0.00", "0.00"), ha="center", va="center", fontsize=7, color=colour
                )


def _draw_layers(
    axis: Axes,
    analysis: Analysis,
    layers: Sequence[str],
    title: str,
    reading: Callable[[Relation], float | None],
) -> None:
    groups = _columns(analysis)
    rows = [[_mean([reading(pair.layers[layer]) for pair in pairs if layer in pair.layers]) for _, pairs in groups]
            for layer in layers]  # fmt: skip
    values = [value for row in rows for value in row if value == value]
    most = max([abs(value) for value in values] + [0.1])
    signed = title == "cosine"
    stem = _stem(layers)
    labels = shortened([layer[len(stem) :] for layer in layers], most=34)
    limits = (-most if signed else 0.0, most)
    _heat(
        axis,
        rows,
        labels,
        [name for name, _ in groups],
        f"{title}, by layer",
        limits,
        "RdBu_r" if signed else "viridis",
    )
    axis.set_aspect("auto")
    if stem:
        axis.set_ylabel(shortened([f"{stem}*"], most=40)[0], fontsize=8)


def _columns(analysis: Analysis) -> list[tuple[str, list[Pair]]]:
    """What the columns of a layer map are called, and the pairs that each stands for."""
    names = [one.name for one in analysis.adapters]
    if len(analysis.pairs) <= NAMED_PAIRS:
        short = dict(zip(names, shortened(names, 12), strict=True))
        return [(f"{short[pair.first]} | {short[pair.second]}", [pair]) for pair in analysis.pairs]
    return [
        (label, [pair for pair in analysis.pairs if name in (pair.first, pair.second)])
        for name, label in zip(names, shortened(names), strict=True)
    ]


def _heat(
    axis: Axes,
    rows: list[list[float]],
    labels: Sequence[str],
    heads: Sequence[str],
    title: str,
    limits: tuple[float, float],
    colours: str,
) -> None:
    from matplotlib import colormaps

    shades = colormaps[colours].with_extremes(bad="lightgrey")  # where a pair has no module in common
    image = axis.imshow(rows, cmap=shades, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axis.set_title(title, fontsize=9)
    step = -(-len(labels) // LABELS)
    axis.set_yticks(range(0, len(labels), step), labels[::step], fontsize=7)
    axis.set_xticks(range(len(heads)), heads, fontsize=7, rotation=90)
    bar = axis.figure.colorbar(image, ax=axis, location="bottom", fraction=0.05, shrink=0.8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.locator_params(nbins=5)


def _draw_one(figure: Figure, analysis: Analysis) -> None:
    [profile], layers = analysis.adapters, analysis.layers
    figure.set_size_inches(10, max(4.5, 1.5 + 0.2 * min(len(layers), LABELS)))
    left, right = figure.subplots(1, 2)
    stem = _stem([layer.name for layer in layers])
    left.barh(range(len(layers)), [layer.norms[0] for layer in layers])
    step = -(-len(layers) // LABELS)
    labels = shortened([layer.name[len(stem) :] for layer in layers], most=34)
    left.set_yticks(range(0, len(layers), step), labels[::step], fontsize=7)
    left.invert_yaxis()
    left.set_title(f"norm by layer: {shortened([profile.name], 40)[0]}", fontsize=9)
    right.plot(range(1, len(profile.energy) + 1), profile.energy, marker=".")
    right.set(ylim=(0, 1.02), xlabel="rank of every module")
    right.locator_params(axis="x", integer=True)
    right.set_title("share of the squared norm that a rank keeps", fontsize=9)


def _stem(layers: Sequence[str]) -> str:
    """The dotted beginning that all layers have in common."""
    parts = [layer.split(".") for layer in layers]
    same = 0
    while len(parts) > 1 and all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return "".join(f"{part}." for part in parts[0][:same])


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")
