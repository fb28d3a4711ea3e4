"""AutoLoRA's gates: how much of each adapter's output passes, decided for every channel, token and layer at run time.

For an input x of a linear layer let h_0 be the frozen layer's output and h_i = delta_i x that of adapter i. The gates
of the layer are shared by all adapters, so any number of them can be fused, in any order, without training for each:

    g_i = sigmoid(w_l * LN_l(h_i) + w_c * LN_0(h_0) * LN_l(h_i) + b)          h = h_0 + sum_i w_o * g_i * h_i

with all products elementwise (Li et al. 2025, AutoLoRA; as its authors' code has it). Importing this needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hub.errors import BadOption

VARIANTS = ("no_base", "full", "no_cross")
OPENNESS = {"no_base": 0.512, "full": 1.0, "no_cross": 0.512}  # w_o at the start
WAVES = 16  # of the timestep's embedding


@dataclass(frozen=True)
class Recipe:
    """What gates are like, all layers alike.

    variant: "no_base" is the paper's; "full" adds w_b * LN_0(h_0) inside the sigmoid; "no_cross" leaves the product
    with the base's output out. global_rank: the rank of one more adapter, the best approximation of all their sum, that
    goes through the same gate; 0 for none. timestep: b depends on the timestep t by a linear map of an embedding of t
    (an extension of ours: in the paper time acts through h_0 and h_i alone). Raises BadOption.
    """

    variant: str = "no_base"
    global_rank: int = 2
    timestep: bool = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise BadOption(f"variant is {self.variant!r}; expected one of {', '.join(VARIANTS)}")
        if self.global_rank < 0:
            raise BadOption(f"global_rank is {self.global_rank}; expected 0 for none, or the global adapter's rank")


class Gate(nn.Module):
    """The gates of one layer with `width` outputs. Before training they are random, as published: N(0, 1)."""

    def __init__(self, width: int, recipe: Recipe, chance: torch.Generator | None = None) -> None:
        super().__init__()
        self.norm_base = nn.LayerNorm(width, eps=1e-5)
        self.norm_delta = nn.LayerNorm(width, eps=1e-5)
        names = ["delta", "bias"]
        names += ["cross"] if recipe.variant != "no_cross" else []
        names += ["base"] if recipe.variant == "full" else []
        self.weights = nn.ParameterDict({name: torch.randn(width, generator=chance) for name in names})
        self.out = nn.Parameter(torch.full((width,), OPENNESS[recipe.variant]))
        self.clock = nn.Linear(2 * WAVES, width, bias=False) if recipe.timestep else None
        if self.clock is not None:
            nn.init.zeros_(self.clock.weight)  # untrained, time plays no part

    def openings(self, base: Tensor, deltas: Tensor, time: Tensor | None = None) -> Tensor:
        """g: (n, ..., width) from h_0 (..., width) and all h_i (n, ..., width); time: (batch,), where gates know it."""
        delta = self.norm_delta(deltas)
        logits = self.weights["delta"] * delta + self.weights["bias"]
        if "cross" in self.weights or "base" in self.weights:
            normal = self.norm_base(base)
            if "cross" in self.weights:
                logits = logits + self.weights["cross"] * normal * delta
            if "base" in self.weights:
                logits = logits + self.weights["base"] * normal
        if self.clock is not None and time is not None:
            shift = self.clock(waves(time).to(logits.dtype))
            logits = logits + shift.reshape(len(shift), *(1,) * (base.ndim - 2), -1)
        return torch.sigmoid(logits)

    def forward(self, base: Tensor, deltas: Tensor, time: Tensor | None = None) -> Tensor:
        """h: (..., width)."""
        return base + self.out * (self.openings(base, deltas, time) * deltas).sum(dim=0)


def waves(time: Tensor) -> Tensor:
    """Sines and cosines of timesteps (0 to 1000), 2 pi to 20,000 pi long: (batch,) -> (batch, 2 WAVES)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(WAVES, device=time.device) / WAVES)
    angles = time.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Gates(nn.Module):
    """The gates of every layer that may carry adapters, by the layer's path in its model.

    widths: path -> the layer's outputs. seed: of the random start; a layer's does not depend on which others there are.
    """

    def __init__(self, widths: Mapping[str, int], recipe: Recipe | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.recipe = recipe or Recipe()
        self.paths = sorted(widths)
        self.layers = nn.ModuleList(
            Gate(widths[path], self.recipe, torch.Generator().manual_seed(_seed(path, seed))) for path in self.paths
        )
        self._index = {path: i for i, path in enumerate(self.paths)}

    def __contains__(self, path: str) -> bool:
        return path in self._index

    def at(self, path: str) -> Gate:
        """The gate of one layer; KeyError where there is none."""
        gate = self.layers[self._index[path]]
        assert isinstance(gate, Gate)
        return gate

    @property
    def widths(self) -> dict[str, int]:
        """Path -> the layer's outputs."""
        return {path: self.at(path).out.numel() for path in self.paths}

    def tensors(self) -> dict[str, Tensor]:
        """All parameters under `<path>:<name>`, as they are stored."""
        return {
            f"{path}:{name}": value.detach() for path in self.paths for name, value in self.at(path).named_parameters()
        }

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Set all parameters from `tensors`. Raises KeyError for one that is missing."""
        with torch.no_grad():
            for path in self.paths:
                for name, value in self.at(path).named_parameters():
                    value.copy_(tensors[f"{path}:{name}"])


def _seed(path: str, seed: int) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(f"{seed} {path}".encode(), digest_size=7).digest(), "little")


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """A recipe from stored settings."""
    return Recipe(str(settings["variant"]), int(settings["global_rank"]), bool(settings["timestep"]))
