"""A map of gates as PNG: a heat map of layers and timesteps for every adapter."""

from __future__ import annotations

import warnings
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from .plot import LABELS, check_target, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from ..merge.gate_maps import GateMap

STEPS = 12  # timesteps named at most


def save_gate_plot(gate_map: GateMap, path: Path, *, force: bool = False) -> Path:
    """Draw a map of gates into a PNG, one panel an adapter, all in one scale from 0 to 1. Replaces atomically.

    Raises BadOption for another kind of file, TargetExists.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..hub.writing import replacing

    check_target(path, force=force)
    panels, layers = len(gate_map.adapters), len(gate_map.layers)
    width = 1.6 + 0.12 * min(len(gate_map.times), 30)
    figure = Figure(dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_size_inches(3.0 + width * panels, max(3.5, 1.8 + 0.2 * min(layers, LABELS)))
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name's sign that the font lacks becomes a box
        images = [_draw(axis, gate_map, i) for i, axis in enumerate(axes)]
        _name_layers(axes[0], gate_map.layers)
        bar = figure.colorbar(images[-1], ax=list(axes), shrink=0.8)
        bar.set_label("mean opening of the gates", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        with replacing(path, force=True) as place:
            figure.savefig(place, format="png")
    return path


def _draw(axis: Axes, gate_map: GateMap, index: int) -> AxesImage:
    from matplotlib import colormaps

    shades = colormaps["viridis"].with_extremes(bad="lightgrey")  # layers that the adapter does not change
    image = axis.imshow(
        gate_map.openings[index], cmap=shades, vmin=0.0, vmax=1.0, interpolation="nearest", aspect="auto"
    )
    axis.set_title(shortened(gate_map.adapters)[index], fontsize=9)
    step = -(-len(gate_map.times) // STEPS)
    labels = [f"{time:.0f}" for time in gate_map.times[::step]]
    axis.set_xticks(range(0, len(gate_map.times), step), labels, fontsize=7, rotation=90)
    axis.set_xlabel("timestep", fontsize=8)
    return image


def _name_layers(axis: Axes, layers: tuple[str, ...]) -> None:
    folders = [layer.split(".")[:-1] for layer in layers] if len(layers) > 1 else []
    alike = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    stem = "".join(f"{parts[0]}." for parts in alike)
    step = -(-len(layers) // LABELS)
    labels = shortened([layer[len(stem) :] for layer in layers], most=34)
    axis.set_yticks(range(0, len(layers), step), labels[::step], fontsize=7)
    if stem:
        axis.set_ylabel(shortened([f"{stem}*"], most=40)[0], fontsize=8)
