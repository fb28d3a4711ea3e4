"""A map of the library as PNG, or as a page whose points say their names."""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.errors import BadOption, TargetExists
from .plot import shortened
from .show import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..index.plane import Point

KINDS = (".png", ".html")
_SIDES = ((6, 0, "left", "center"), (-6, 0, "right", "center"), (0, 6, "center", "bottom"), (0, -6, "center", "top"))


def check_map_target(path: Path, *, force: bool) -> None:
    """Raise, before any work, BadOption for a file of another kind, TargetExists for one that must not be replaced."""
    if path.suffix.lower() not in KINDS:
        raise BadOption(f"--out {path}: a map is a PNG or a page; give a name that ends in .png or .html")
    if path.exists() and not force:
        raise TargetExists(f"{path}: exists already; choose another --out, or --force to replace it")


def save_map(points: Sequence[Point], path: Path, *, title: str, labels: int = 60, force: bool = False) -> Path:
    """Draw the points into a PNG or an HTML page, named by its ending; at most `labels` names, none over another.

    Replaces atomically; equal points give equal bytes.
    """
    from matplotlib import rc_context

    from ..hub.writing import replacing

    check_map_target(path, force=force)
    page = path.suffix.lower() == ".html"
    # a fixed salt, because matplotlib names a picture's parts at random
    settings: Any = {"svg.hashsalt": "map", "svg.fonttype": "none"}
    with warnings.catch_warnings(), rc_context(settings):
        warnings.simplefilter("ignore", UserWarning)  # a name's sign that the font lacks becomes a box
        figure = _figure(points, title, labels)
        with replacing(path, force=True) as place:
            if page:
                place.write_text(_page(figure, points, title), encoding="utf-8")
            else:
                figure.savefig(place, format="png")
    return path


def _figure(points: Sequence[Point], title: str, labels: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    size = _size(points)
    colours = _colours(points)
    names = shortened([str(theme) for theme in colours], 30)
    for (theme, colour), name in zip([*colours.items(), (None, "0.7")], [*names, "other"], strict=True):
        here = [point for point in points if point.theme == theme]
        if here:
            label = f"{name} ({len(here)})"
            places = [point.x for point in here], [point.y for point in here]
            axis.plot(*places, "o", ms=size, color=colour, mec="white", mew=0.4, label=label)
    if colours:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    axis.set(xlim=(-0.08, 1.08), ylim=(-0.05, 1.05), xticks=[], yticks=[])
    axis.set_title(title.replace("$", r"\$"), fontsize=11)
    figure.canvas.draw()  # so that the texts' sizes are known
    figure.set_layout_engine("none")  # nothing moves from here on
    _label(axis, points, labels)
    return figure


def _size(points: Sequence[Point]) -> float:
    """The points' diameter in points."""
    return max(3.0, min(8.0, 160 / math.sqrt(len(points))))


def _colours(points: Sequence[Point]) -> dict[str | None, Any]:
    """A colour for each theme, the commonest first."""
    from collections import Counter

    from matplotlib import colormaps

    counts = Counter(point.theme for point in points if point.theme is not None)
    shades = colormaps["tab10"](range(10))
    ranked = sorted(counts, key=lambda theme: (-counts[theme], theme))
    return {theme: shades[k % len(shades)] for k, theme in enumerate(ranked)}


def _label(axis: Axes, points: Sequence[Point], most: int) -> None:
    """Names where there is room: points far from one another first, so that every region has some.

    No name lies over another, and over a point only where its own has no free side.
    """
    import numpy as np

    names = shortened([point.entry.name for point in points], 24)
    at = axis.transData.transform([(point.x, point.y) for point in points])
    frame = axis.get_window_extent()
    taken: list[Any] = []
    for place in spread([(point.x, point.y) for point in points], 4 * most):
        if len(taken) >= most:
            break
        text = axis.annotate(
            names[place], (points[place].x, points[place].y), (0, 0), textcoords="offset points", fontsize=7
        )
        rooms: list[tuple[int, int, Any]] = []
        for number, side in enumerate(_SIDES):
            _move(text, side)
            box = text.get_window_extent().padded(1)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                covered = np.abs(at - [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]) * 2 <= [box.width, box.height]
                rooms.append((int(covered.all(axis=1).sum()), number, box))
        if rooms:
            _, number, box = min(rooms, key=lambda room: room[:2])
            _move(text, _SIDES[number])
            taken.append(box)
        else:
            text.remove()


def _move(text: Any, side: tuple[int, int, str, str]) -> None:
    text.set(position=side[:2], ha=side[2], va=side[3])


def spread(places: Sequence[tuple[float, float]], most: int) -> list[int]:
    """Indices of at most `most` places, each the farthest from those before it."""
    import numpy as np

    at = np.array(places, np.float64).reshape(-1, 2)
    chosen: list[int] = []
    distance = np.full(len(at), np.inf)
    following = int(np.argmin(at.sum(axis=1))) if len(at) else 0
    while len(chosen) < min(most, len(at)):
        chosen.append(following)
        distance = np.minimum(distance, ((at - at[following]) ** 2).sum(axis=1))
        distance[following] = -1.0
        following = int(distance.argmax())
    return chosen


def _page(figure: Figure, points: Sequence[Point], title: str) -> str:
    """The picture as SVG in a page, with a ring over every point that says its name, theme and description."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") : drawing.rindex("</svg>")]
    height, scale = 72 * figure.get_figheight(), 72 / figure.dpi  # SVG counts in points, from the top
    at = figure.axes[0].transData.transform([(point.x, point.y) for point in points]) * scale
    rings = "\n".join(
        f'<circle cx="{x:.2f}" cy="{height - y:.2f}" r="{_size(points) / 2:.2f}"><title>'
        f"{html.escape(_tooltip(point))}</title></circle>"
        for point, (x, y) in zip(points, at, strict=True)
    )
    style = (
        "body{margin:0;font-family:sans-serif}svg{width:100%;height:100vh}"
        "circle{fill:transparent;stroke:none}circle:hover{stroke:black;stroke-width:2}"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(printable(title))}</title>'
        f"<style>{style}</style></head>\n<body>\n{drawing}{rings}\n</svg>\n</body></html>\n"
    )


def _tooltip(point: Point) -> str:
    entry = point.entry
    said = entry.description if len(entry.description) <= 200 else f"{entry.description[:200]} ..."
    return printable("\n".join(part for part in (entry.name, point.theme or "", said) if part))
