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
STARTS = ("published", "open")
OPEN_BIAS, OPEN_SPREAD = 3.0, 0.02  # a gate that starts open: sigmoid(3) = 0.95, nearly whatever the outputs are
WAVES = 16  # of the timestep's embedding
EPS = 1e-5  # of the LayerNorms


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


@dataclass(frozen=True)
class Folded:
    """A gate with all that does not depend on its inputs computed beforehand: what runs in a layer.

    With n_0 and n_i the outputs of base and adapter scaled to mean 0 and variance 1 over channels, the gate is
    g_i = sigmoid((slope + slope_base n_0) n_i + offset + offset_base n_0); a term that is None is 0. All are (width,).
    one, zero: just that; a LayerNorm that is given such weights is much faster on a CPU than one without.
    """

    slope: Tensor
    offset: Tensor
    out: Tensor
    one: Tensor
    zero: Tensor
    slope_base: Tensor | None
    offset_base: Tensor | None

    def openings(self, base: Tensor, deltas: Tensor, shift: Tensor | None = None) -> Tensor:
        """g: (n, ..., width) from h_0 (..., width) and all h_i (n, ..., width). shift: (..., width), added inside."""
        slope, offset = self.slope, self.offset if shift is None else self.offset + shift
        if self.slope_base is not None or self.offset_base is not None:
            normal = self._normal(base)
            if self.slope_base is not None:
                slope = torch.addcmul(slope, normal, self.slope_base)
            if self.offset_base is not None:
                offset = torch.addcmul(offset, normal, self.offset_base)
        normal = self._normal(deltas)
        if torch.is_grad_enabled():
            return torch.sigmoid(torch.addcmul(offset, normal, slope))
        return torch.addcmul(offset, normal, slope, out=normal).sigmoid_()

    def through(self, base: Tensor, deltas: Tensor, openings: Tensor, into: Tensor | None = None) -> Tensor:
        """h: (..., width), written `into` a tensor where one is given. Without gradients `openings` are used up."""
        passed = openings * deltas if torch.is_grad_enabled() else openings.mul_(deltas)
        return torch.addcmul(base, self.out, passed.sum(dim=0), out=into)

    def _normal(self, value: Tensor) -> Tensor:
        return nn.functional.layer_norm(value, value.shape[-1:], self.one, self.zero, EPS)

    def like(self, value: Tensor) -> Folded:
        """The same, of the dtype and on the device of `value`."""
        return Folded(*(None if one is None else one.to(value) for one in vars(self).values()))  # type: ignore[arg-type]


class Gate(nn.Module):
    """The gates of one layer with `width` outputs. Before training they are random, as published: N(0, 1).

    start: "open" is ours: the bias is 3 and the weights inside the sigmoid are small, w_o is 1. So nearly the plain sum
    of all inputs passes at first (of the global adapter, too, where there is one).
    """

    def __init__(
        self, width: int, recipe: Recipe, chance: torch.Generator | None = None, start: str = "published"
    ) -> None:
        super().__init__()
        self.norm_base = nn.LayerNorm(width, eps=EPS)
        self.norm_delta = nn.LayerNorm(width, eps=EPS)
        names = ["delta", "bias"]
        names += ["cross"] if recipe.variant != "no_cross" else []
        names += ["base"] if recipe.variant == "full" else []
        self.weights = nn.ParameterDict({name: torch.randn(width, generator=chance) for name in names})
        self.out = nn.Parameter(torch.full((width,), OPENNESS[recipe.variant]))
        self.clock = None
        if recipe.timestep:  # untrained, time plays no part; the global random state is not used
            self.clock = nn.utils.skip_init(nn.Linear, 2 * WAVES, width, bias=False)  # type: ignore[no-untyped-call]
            nn.init.zeros_(self.clock.weight)
        if start == "open":
            self._open()

    def _open(self) -> None:
        with torch.no_grad():
            for weight in self.weights.values():
                weight.mul_(OPEN_SPREAD)
            self.weights["bias"].fill_(OPEN_BIAS)
            self.out.fill_(1.0)

    def folded(self) -> Folded:
        """What of the gate does not depend on its inputs; gradients pass."""
        own, norm, weights = self.norm_delta, self.norm_base, self.weights
        slope, offset, slope_base, offset_base = weights["delta"], weights["bias"], None, None
        if "cross" in weights:
            slope = torch.addcmul(slope, weights["cross"], norm.bias)
            slope_base = weights["cross"] * norm.weight
            offset_base = slope_base * own.bias
            slope_base = slope_base * own.weight
        offset = torch.addcmul(offset, slope, own.bias)
        if "base" in weights:
            offset = torch.addcmul(offset, weights["base"], norm.bias)
            more = weights["base"] * norm.weight
            offset_base = more if offset_base is None else offset_base + more
        one, zero = torch.ones_like(self.out), torch.zeros_like(self.out)
        return Folded(slope * own.weight, offset, self.out, one, zero, slope_base, offset_base)

    def shift(self, features: Tensor, ndim: int) -> Tensor | None:
        """What the timestep's `waves` (batch, 2 WAVES) add inside the sigmoid, for outputs of `ndim` dimensions."""
        if self.clock is None:
            return None
        shift: Tensor = self.clock(features.to(self.clock.weight))
        return shift.reshape(len(shift), *(1,) * (ndim - 2), -1)

    def openings(self, base: Tensor, deltas: Tensor, time: Tensor | None = None) -> Tensor:
        """g: (n, ..., width) from h_0 (..., width) and all h_i (n, ..., width); time: (batch,), where gates know it."""
        shift = None if time is None or self.clock is None else self.shift(waves(time), base.ndim)
        return self.folded().openings(base, deltas, shift)

    def forward(self, base: Tensor, deltas: Tensor, time: Tensor | None = None) -> Tensor:
        """h: (..., width)."""
        return self.folded().through(base, deltas, self.openings(base, deltas, time))


def waves(time: Tensor) -> Tensor:
    """Sines and cosines of timesteps (0 to 1000), 2 pi to 20,000 pi long: (batch,) -> (batch, 2 WAVES)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(WAVES, device=time.device) / WAVES)
    angles = time.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Gates(nn.Module):
    """The gates of every layer that may carry adapters, by the layer's path in its model.

    widths: path -> the layer's outputs. seed: of the random start; a layer's does not depend on which others there are.
    start: "published", or "open" (see Gate). Raises BadOption.
    """

    def __init__(
        self, widths: Mapping[str, int], recipe: Recipe | None = None, *, seed: int = 0, start: str = "published"
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise BadOption(f"start is {start!r}; expected one of {', '.join(STARTS)}")
        self.recipe = recipe or Recipe()
        self.paths = sorted(widths)
        self.layers = nn.ModuleList(
            Gate(widths[path], self.recipe, torch.Generator().manual_seed(_seed(path, seed)), start)
            for path in self.paths
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
