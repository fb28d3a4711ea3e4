"""Maps of gates: means of the openings that the formula gives, at the right place, and drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lorahub.cli.plot_gates import save_gate_plot
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, TargetExists
from lorahub.hub.lowrank import LowRank
from lorahub.merge.gate_maps import GateMap, observe
from lorahub.merge.gates import Gates, Recipe
from torch import Tensor, nn


class Pair(nn.Module):
    """Two linear layers one after the other, the later one named first; called with a timestep that plays no part."""

    def __init__(self) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(0)
        self.zero, self.alpha = nn.Linear(4, 5), nn.Linear(5, 6)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=chance).requires_grad_(False)

    def forward(self, value: Tensor, timestep: Tensor) -> Tensor:
        middle: Tensor = self.zero(value)
        self.middle = middle
        result: Tensor = self.alpha(middle)
        return result


def delta(outputs: int, inputs: int, seed: int) -> LowRank:
    chance = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(2, inputs, generator=chance), torch.randn(outputs, 2, generator=chance))


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    both = {"pair.zero": delta(5, 4, 1), "pair.alpha": delta(6, 5, 2)}
    late = {"pair.alpha": delta(6, 5, 3), "other.zero": delta(9, 9, 4)}
    return [Adapter(both, meta={"name": "both"}), Adapter(late, meta={"name": "late"})]


INPUTS = {900.0: torch.linspace(-2, 2, 24).reshape(2, 3, 4), 100.0: torch.linspace(3, -1, 24).reshape(2, 3, 4).sin()}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_map_holds_the_means_of_the_formula(adapters: list[Adapter], rank: int) -> None:
    model = Pair()
    gates = Gates({"zero": 5, "alpha": 6}, Recipe(global_rank=rank), seed=2).requires_grad_(False)
    middles: dict[float, list[Tensor]] = {}

    def paint() -> None:
        for time in (900.0, 100.0, 100.0):  # the last twice, with other values the second time
            value = INPUTS[time] * (1 + len(middles.get(time, [])))
            model(value, torch.tensor([time, time]))
            middles.setdefault(time, []).append(model.middle)

    found = observe(model, adapters, gates, paint, [1.0, 0.5], component="pair")
    assert found.adapters == (("both", "late", "global") if rank else ("both", "late"))
    assert found.layers == ("zero", "alpha")
    assert found.times == (900.0, 100.0)
    assert found.openings.shape == (2 + rank, 2, 2)
    assert np.isnan(found.openings[1, 0]).all()
    first, late = (one.modules["pair.alpha"].dense() for one in adapters)
    deltas = [first, 0.5 * late]
    if rank:
        u, values, vh = torch.linalg.svd(first + 0.5 * late)
        deltas.append(values[0] * u[:, :1] @ vh[:1])
    gate = gates.at("alpha")
    for i, time in enumerate(found.times):
        wanted = []
        for value in middles[time]:
            outputs = torch.stack([value @ matrix.T for matrix in deltas])
            base = value @ model.alpha.weight.T + model.alpha.bias
            wanted.append(opened(gate, base, outputs))
        np.testing.assert_allclose(found.openings[:, 1, i], np.mean(wanted, axis=0), rtol=1e-4)


def opened(gate: nn.Module, base: Tensor, deltas: Tensor) -> np.ndarray:
    """Mean openings by the published formula; the LayerNorms' own weights are 1 and 0 before training."""

    def normal(value: Tensor) -> Tensor:
        centred = value - value.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    weights = gate.weights
    logits = weights["delta"] * normal(deltas) + weights["cross"] * normal(base) * normal(deltas) + weights["bias"]
    return (1 / (1 + (-logits).exp())).flatten(1).mean(dim=1).numpy()


def test_a_map_is_drawn_with_a_panel_for_every_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *of, **how: (figures.append(self), saved(self, *of, **how))[1])
    openings = np.random.default_rng(0).random((3, 50, 30))
    openings[1, :7] = np.nan
    layers = tuple(f"transformer_blocks.{i}.attn1.to_q" for i in range(50))
    times = tuple(np.linspace(1000, 33, 30))
    drawn = GateMap(("watercolor", "fox $x$ \N{CAT FACE}", "global"), layers, times, openings)
    path = save_gate_plot(drawn, tmp_path / "gates.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    *panels, bar = figures[0].axes
    assert [axis.get_title() for axis in panels][::2] == ["watercolor", "global"]
    for axis, wanted in zip(panels, openings, strict=True):
        [image] = axis.images
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), wanted)
        assert image.get_clim() == (0.0, 1.0)
        assert axis.get_xlabel() == "timestep"
        assert len(axis.get_xticks()) <= 12
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names[:2] == ["0.attn1.to_q", "2.attn1.to_q"]
    assert panels[0].get_ylabel() == "transformer_blocks.*"
    assert "opening" in bar.get_ylabel()
    with pytest.raises(TargetExists):
        save_gate_plot(drawn, path)
    save_gate_plot(GateMap(("one",), ("alone",), (0.0,), np.ones((1, 1, 1))), path, force=True)
    with pytest.raises(BadOption, match=r"ends in \.png"):
        save_gate_plot(drawn, tmp_path / "gates.jpg")
