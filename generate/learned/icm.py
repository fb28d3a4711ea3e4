"""ICM-LoRA (arXiv 2501.17635): a convolutional CVAE of flat adapters, conditioned on a task vector.

As published it rebuilds adapters that exist: its condition is read from the task's own tuned model, and so is the scale
of what it makes. Both can be had without them here: words as condition, the library's statistics as scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ...hub.errors import BadOption, FormatError
from ..cvae import Convolutions, Course, Cvae, Fitted, Lessons, fit, rebuilt, recipe_from, recipe_json
from ..layout import Layout, Statistics
from ..library import Vectors
from ..priors import Memory, asked, threshold
from ..run import Generated
from ..taught import Origin, School, directions

SCALES = ("library", "tensor", "own")

Scales = Literal["library", "tensor", "own"]


@dataclass(frozen=True)
class Icm:
    """A fitted ICM-LoRA generator.

    means, spreads: (1, size), or one row for each expert where the scale is the expert's own: then the expert nearest
    to the condition lends it. random: whether codes are drawn from N(0, I), as published, or zero.
    """

    layout: Layout
    origin: Origin
    memory: Memory
    means: Tensor
    spreads: Tensor
    fitted: Fitted
    random: bool = True
    kind: str = "icm"

    def sample(self, query: Vectors, *, seed: int) -> Generated:
        """An adapter for a condition (dim,): a description's unit vector, or a task vector if it was fitted to them.

        Raises GenerationError for a condition of another length.
        """
        condition = asked(query, self.memory.keys)[None]
        near = self.memory.nearest(query)
        noise = torch.randn(1, self._recipe.latent, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            made = self._network.decode(noise if self.random else 0 * noise, condition)[0, : self.layout.size].clone()
        row = self.memory.names.index(near[0].name) if len(self.means) > 1 else 0
        vector = Statistics(self.means[row], self.spreads[row]).restore(made)
        return self.memory.generated(self.layout, vector, near, self.kind)

    def facts(self) -> dict[str, Any]:
        """What a file says of it, beside tensors."""
        return {"names": list(self.memory.names), "random": self.random, "recipe": recipe_json(self.fitted.recipe)}

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it."""
        held = {"keys": self.memory.keys, "experts": self.memory.means, "means": self.means, "spreads": self.spreads}
        return held | {f"network.{name}": tensor for name, tensor in self.fitted.tensors.items()}

    @property
    def _recipe(self) -> Convolutions:
        assert isinstance(self.fitted.recipe, Convolutions)
        return self.fitted.recipe

    @cached_property
    def _network(self) -> Cvae:
        return rebuilt(self.fitted.recipe, self.fitted.tensors)


def icm(
    school: School,
    *,
    conditions: Sequence[Vectors] | None = None,
    scale: Scales = "library",
    weight: float = 0.005,
    latent: int = 256,
    channels: int = 8,
    stages: int = 12,
    norm: Literal["batch", "group"] = "batch",
    steps: int = 1500,
    batch: int = 16,
    rate: float = 2e-4,
    falling: float = 0.5,
    random: bool = True,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Icm:
    """Fit one ICM-LoRA generator to all experts.

    conditions: each expert's task vectors (k, dim), see `generate.conditions.task_vector` (the paper's, which need the
    expert itself); None takes the descriptions' vectors (ICM-style, an extension). scale: "library" standardises every
    coordinate over the library, "tensor" every factor; "own" every factor of every checkpoint, and lends a result the
    scale of the nearest expert's last checkpoint, as published. weight: of the KL (beta). latent, channels, stages,
    norm: see `Convolutions`; the published code has batches of 2, which BatchNorm hardly bears, and `falling` 0.5.
    random: draw codes from N(0, I), or take their mean.
    """
    if scale not in SCALES:
        raise BadOption(f"scale is {scale!r}; expected one of {', '.join(SCALES)}")
    given = [torch.as_tensor(some).float() for some in (school.vectors if conditions is None else conditions)]
    if len(given) != len(school.experts) or len({some.shape[1:] for some in given}) != 1 or given[0].ndim != 2:
        raise BadOption(f"{len(given)} conditions for {len(school.experts)} experts; expected (k, dim) for each")
    values, means, spreads = scaled(school, scale)
    owners = torch.arange(len(school.experts)).repeat_interleave(torch.tensor([len(some) for some in school.weights]))
    recipe = Convolutions(school.layout.size, given[0].shape[1], latent, channels, stages, norm)
    course = Course(steps, batch, rate, weight, mean=True, falling=falling, seed=seed)
    fitted = fit(recipe, Lessons(values, owners, given), course, progress=progress)
    told = {
        **fitted.told, "steps": steps, "seed": seed, "scale": scale, "near": threshold(given),
        "condition": "text" if conditions is None else "task vector",
    }  # fmt: skip
    memory = Memory(school.names, directions(given), torch.stack([some.mean(dim=0) for some in school.weights]))
    return Icm(school.layout, school.origin(**told), memory, means, spreads, fitted, random)


def scaled(school: School, scale: Scales) -> tuple[Tensor, Tensor, Tensor]:
    """All checkpoints as the network sees them (n, size), and the means and spreads (1 or experts, size) of the way
    back."""
    whole = torch.cat(school.weights)
    if scale == "own":
        own = [Statistics.by_tensor(vector[None], school.layout) for vector in whole]
        values = torch.stack([one.standardise(vector) for one, vector in zip(own, whole, strict=True)])
        ends = torch.tensor([len(some) for some in school.weights]).cumsum(0) - 1
        last = [own[int(end)] for end in ends]
        return values, torch.stack([one.mean for one in last]), torch.stack([one.spread for one in last])
    known = Statistics.of(whole) if scale == "library" else Statistics.by_tensor(whole, school.layout)
    return known.standardise(whole), known.mean[None], known.spread[None]


def restore(layout: Layout, origin: Origin, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Icm:
    """The inverse of `facts` and `tensors`. Raises FormatError, KeyError or ValueError where they do not fit."""
    recipe = recipe_from(facts["recipe"], Convolutions)
    held = {name.removeprefix("network."): part for name, part in tensors.items() if name.startswith("network.")}
    memory = Memory(tuple(map(str, facts["names"])), tensors["keys"], tensors["experts"])
    made = Icm(
        layout, origin, memory, tensors["means"], tensors["spreads"], Fitted(recipe, held, {}), bool(facts["random"])
    )
    count, size = len(memory.names), layout.size
    rows = {1, count} & {len(made.means)}
    expected = {"keys": (count, recipe.condition), "experts": (count, size)}
    expected |= {name: (next(iter(rows), 1), size) for name in ("means", "spreads")}
    shapes = {name: tuple(tensors[name].shape) for name in expected}
    if shapes != expected or recipe.size != size:
        raise FormatError(f"its tensors have shapes {shapes}; expected {expected}")
    _ = made._network
    return made
