"""SG-LoRA (arXiv 2509.10535): the nearest experts' mean and variance, and a CVAE with a prior that depends on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ...hub.errors import BadOption, FormatError
from ..cvae import Course, Cvae, Fitted, Layers, Lessons, fit, rebuilt, recipe_from, recipe_json
from ..layout import Layout, Projection, Statistics, principal
from ..library import Vectors
from ..priors import Memory, Prior, Prototypes, check, conditions, threshold
from ..run import Generated
from ..taught import Origin, School

LARGE = 2**14  # numbers of a vector from which on it is projected, unless told otherwise
MODES = ("sample", "mean", "gaussian", "average")

Mode = Literal["sample", "mean", "gaussian", "average"]


@dataclass(frozen=True)
class Semantic:
    """A fitted SG-LoRA generator.

    mode: "sample" decodes a code from p(z|c), "mean" the mean of p(z|c); "gaussian" draws from the prior itself and
    "average" takes its mean, both without the CVAE (`dataclasses.replace(generator, mode=...)`). Prototypes are in the
    network's coordinates: standardised over the library, and projected where `projection` is not None.
    """

    layout: Layout
    origin: Origin
    names: tuple[str, ...]
    prototypes: Prototypes
    statistics: Statistics
    projection: Projection | None
    fitted: Fitted
    neighbours: int
    temperature: float
    mode: Mode = "sample"
    kind: str = "semantic"

    def sample(self, query: Vectors, *, seed: int) -> Generated:
        """An adapter for a description's unit vector (dim,). Raises GenerationError for a vector of another length."""
        prior = self.prior(query)
        vector = self._restore(self._coordinates(prior, seed))
        return self._memory.generated(self.layout, vector, self._memory.shares(prior), self.kind)

    def prior(self, query: Vectors) -> Prior:
        """Which experts are taken, and what they say, in the network's coordinates."""
        return self.prototypes.prior(query, self.neighbours, self.temperature)

    def facts(self) -> dict[str, Any]:
        """What a file says of it, beside tensors."""
        return {
            "names": list(self.names),
            "neighbours": self.neighbours,
            "temperature": self.temperature,
            "mode": self.mode,
            "recipe": recipe_json(self.fitted.recipe),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it."""
        held = {
            "means": self.prototypes.means,
            "variances": self.prototypes.variances,
            "keys": self.prototypes.keys,
            "mean": self.statistics.mean,
            "spread": self.statistics.spread,
        }
        if self.projection is not None:
            held["axes"] = self.projection.axes
        return held | {f"network.{name}": tensor for name, tensor in self.fitted.tensors.items()}

    def _coordinates(self, prior: Prior, seed: int) -> Tensor:
        """(size,) of the network."""
        if self.mode == "gaussian":
            return prior.draw(seed)
        if self.mode == "average":
            return prior.mean
        with torch.inference_mode():
            condition = _condition(prior, self._network_spread)[None]
            expected = self._network.prior(condition)
            noise = torch.randn(expected.mean.shape, generator=torch.Generator().manual_seed(seed))
            code = expected.mean if self.mode == "mean" else expected.at(noise)
            return self._network.decode(code, condition)[0].clone()

    def _restore(self, coordinates: Tensor) -> Tensor:
        wide = coordinates if self.projection is None else self.projection.restore(coordinates)
        return self.statistics.restore(wide)

    @property
    def _network_spread(self) -> Tensor:
        return self.fitted.tensors["spread"]

    @cached_property
    def _network(self) -> Cvae:
        return rebuilt(self.fitted.recipe, self.fitted.tensors)

    @cached_property
    def _memory(self) -> Memory:
        return Memory(self.names, self.prototypes.keys, self._restore(self.prototypes.means))


def semantic(
    school: School,
    *,
    neighbours: int = 4,
    temperature: float = 0.05,
    weight: float = 1.0,
    latent: int = 64,
    hidden: int = 512,
    steps: int = 2000,
    batch: int = 64,
    rate: float = 1e-3,
    leave_out: bool = True,
    components: int | None = None,
    mode: Mode = "sample",
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Semantic:
    """Fit SG-LoRA's semantic CVAE.

    neighbours (K) and temperature: of the softmax over the nearest experts; `priors.tuned` chooses both. weight: of the
    KL (lambda). latent, hidden: widths, which are not published. leave_out: in training an expert's own checkpoints
    take no part in its condition, as at generation; without it the network learns to copy. components: deviation for
    long vectors, principal directions that the networks work in: None for all that the library spans (lossless there)
    where a vector has more than 16,384 numbers, 0 never. mode: see `Semantic`.
    """
    check(neighbours, temperature)
    if mode not in MODES or (components is not None and components < 0):
        raise BadOption(f"mode is {mode!r}, components {components}; expected one of {', '.join(MODES)}, 0 or more")
    owners = torch.arange(len(school.experts)).repeat_interleave(torch.tensor([len(some) for some in school.weights]))
    whole = torch.cat(school.weights)
    statistics = Statistics.of(whole)
    values = statistics.standardise(whole)
    projection = _projection(values, components)
    values = values if projection is None else projection.reduce(values)
    spread = torch.ones(values.shape[1]) if projection is None else Statistics.of(values).spread
    prototypes = Prototypes.of(torch.split(values, [len(some) for some in school.weights]), school.keys)
    asked = conditions(prototypes, school.vectors, neighbours, temperature, leave_out=leave_out)
    lessons = Lessons(values, owners, _stacked(asked, spread))
    recipe = Layers(values.shape[1], 2 * values.shape[1], latent, hidden)
    course = Course(steps, batch, rate, weight, mean=False, seed=seed)
    fitted = fit(recipe, lessons, course, spread=spread, progress=progress)
    told = {**fitted.told, "steps": steps, "seed": seed, "leave_out": leave_out, "near": threshold(school.vectors)}
    return Semantic(
        school.layout, school.origin(**told), school.names, prototypes, statistics, projection, fitted, neighbours,
        temperature, mode,
    )  # fmt: skip


def restore(layout: Layout, origin: Origin, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Semantic:
    """The inverse of `facts` and `tensors`. Raises FormatError, KeyError or ValueError where they do not fit."""
    recipe = recipe_from(facts["recipe"], Layers)
    held = {name.removeprefix("network."): part for name, part in tensors.items() if name.startswith("network.")}
    made = Semantic(
        layout,
        origin,
        tuple(map(str, facts["names"])),
        Prototypes(tensors["means"], tensors["variances"], tensors["keys"]),
        Statistics(tensors["mean"], tensors["spread"]),
        Projection(tensors["axes"]) if "axes" in tensors else None,
        Fitted(recipe, held, {}),
        int(facts["neighbours"]),
        float(facts["temperature"]),
        facts["mode"],
    )
    check(made.neighbours, made.temperature)
    count, size, width = len(made.names), layout.size, recipe.size
    expected = {"means": (count, width), "variances": (count, width), "mean": (size,), "spread": (size,)}
    expected |= {"axes": (width, size)} if made.projection is not None else {}
    shapes = {name: tuple(tensors[name].shape) for name in expected}
    fitting = shapes == expected and tensors["keys"].shape[:1] == (count,) and tensors["keys"].ndim == 2
    if not fitting or (made.projection is None and width != size) or made.mode not in MODES:
        raise FormatError(f"its tensors have shapes {shapes}; expected {expected}")
    _ = made._network
    return made


def _projection(values: Tensor, components: int | None) -> Projection | None:
    if components == 0 or (components is None and values.shape[1] <= LARGE):
        return None
    return principal(values, components or len(values))


def _condition(prior: Prior, spread: Tensor) -> Tensor:
    """c = (mean, deviation) in units of the library's spread: (2 * size,)."""
    return torch.cat([prior.mean / spread, prior.variance.sqrt() / spread])


def _stacked(asked: Sequence[Sequence[Prior]], spread: Tensor) -> list[Tensor]:
    return [torch.stack([_condition(prior, spread) for prior in some]) for some in asked]
