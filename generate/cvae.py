"""Conditional variational auto-encoders of flat adapters, and the loop that fits them.

Two networks: ICM-LoRA's (arXiv 2501.17635), 1-D convolutions with the prior N(0, I); and SG-LoRA's (arXiv 2509.10535),
plain layers with a prior that depends on the condition. Importing this needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..hub.errors import BadOption, FormatError, GenerationError
from .experts import generator

KERNEL = 7
_LIMIT = 2**31
_COUNTER = "num_batches_tracked"  # BatchNorm's, which nothing here uses


class Gaussian(NamedTuple):
    """Normal distributions with diagonal covariance: mean and log variance, (batch, latent) each."""

    mean: Tensor
    log_variance: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """mean + deviation * noise: (batch, latent)."""
        return self.mean + (self.log_variance / 2).exp() * noise


def divergence(some: Gaussian, prior: Gaussian) -> Tensor:
    """KL(some || prior) in closed form, summed over the latent: (batch,)."""
    ratio = some.log_variance - prior.log_variance
    apart = (some.mean - prior.mean).square() / prior.log_variance.exp()
    return (ratio.exp() + apart - 1 - ratio).sum(dim=1) / 2


class Cvae(nn.Module):
    """Values (batch, size) given conditions (batch, width), through codes (batch, latent).

    reach: length of what `decode` makes, `size` or more; what lies beyond `size` is padding. The parameters of
    `decoder` are all that `decode` needs.
    """

    reach: int

    def encode(self, values: Tensor, conditions: Tensor) -> Gaussian:
        """q(code | value, condition)"""
        raise NotImplementedError

    def prior(self, conditions: Tensor) -> Gaussian:
        """p(code | condition)"""
        raise NotImplementedError

    def decode(self, codes: Tensor, conditions: Tensor) -> Tensor:
        """Values, padded: (batch, reach)."""
        raise NotImplementedError


# --- ICM-LoRA: convolutions -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolutions:
    """ICM-LoRA's network for values (size,) and conditions (condition,).

    The defaults are the published ones: 12 stages that halve the length, 8 to 256 channels and back to 8, a latent of
    256, BatchNorm. Deviations for small worlds: `stages` and `channels` (of the first stage) make it smaller; `norm`
    "group" takes GroupNorm, which does not depend on who else is in the batch and is the same in use as in training:
    1,728 random numbers, learned by heart in 500 steps, came back to within 0.1 %; with BatchNorm to within 4 %.
    """

    size: int
    condition: int
    latent: int = 256
    channels: int = 8
    stages: int = 12
    norm: Literal["batch", "group"] = "batch"

    def build(self) -> Cvae:
        if not (1 <= self.stages <= 16 and min(self.size, self.condition, self.latent, self.channels) >= 1):
            raise BadOption(f"{self} makes no network; expected 1 to 16 stages and sizes of at least 1")
        if self.norm not in ("batch", "group"):
            raise BadOption(f"norm is {self.norm!r}; expected batch or group")
        return _Convolutional(self)

    @property
    def length(self) -> int:
        """Of a value at the narrowest point."""
        return -(-self.size >> self.stages)

    @property
    def widths(self) -> list[int]:
        """Channels after each stage: 8, 16, ... 256, 256, ... 8."""
        return [self.channels * 2 ** min(at, self.stages - 1 - at) for at in range(self.stages)]


class _Convolutional(Cvae):
    def __init__(self, recipe: Convolutions) -> None:
        super().__init__()
        self.reach = recipe.length * 2**recipe.stages
        self.latent = recipe.latent
        self.encoder = nn.ModuleDict(_reading(recipe))
        self.decoder = nn.Sequential(
            nn.Linear(recipe.latent + recipe.condition, recipe.widths[-1] * recipe.length),
            nn.Unflatten(1, (recipe.widths[-1], recipe.length)),
            *_growing(recipe),
        )

    def encode(self, values: Tensor, conditions: Tensor) -> Gaussian:
        seen = self.encoder["stages"](padded(values, self.reach)[:, None])
        joint = torch.cat([self.encoder["flat"](seen.flatten(1)), conditions], dim=1)
        return Gaussian(self.encoder["mean"](joint), self.encoder["log_variance"](joint))

    def prior(self, conditions: Tensor) -> Gaussian:
        nothing = conditions.new_zeros(len(conditions), self.latent)
        return Gaussian(nothing, nothing)

    def decode(self, codes: Tensor, conditions: Tensor) -> Tensor:
        made: Tensor = self.decoder(torch.cat([codes, conditions], dim=1))
        return made[:, 0]


def _reading(recipe: Convolutions) -> dict[str, nn.Module]:
    stages: list[nn.Module] = []
    for inputs, outputs in pairwise([1, *recipe.widths]):
        stages += [nn.Conv1d(inputs, outputs, KERNEL, 2, KERNEL // 2), _norm(recipe, outputs), nn.LeakyReLU()]
    joint = recipe.latent + recipe.condition
    return {
        "stages": nn.Sequential(*stages),
        "flat": nn.Linear(recipe.widths[-1] * recipe.length, recipe.latent),
        "mean": nn.Linear(joint, recipe.latent),
        "log_variance": nn.Linear(joint, recipe.latent),
    }


def _growing(recipe: Convolutions) -> Iterator[nn.Module]:
    widths = [*reversed(recipe.widths), recipe.channels]
    for inputs, outputs in pairwise(widths):
        yield nn.ConvTranspose1d(inputs, outputs, KERNEL, 2, KERNEL // 2, output_padding=1)
        yield _norm(recipe, outputs)
        yield nn.ELU()
    yield nn.Conv1d(recipe.channels, 1, KERNEL, padding=KERNEL // 2)


def _norm(recipe: Convolutions, channels: int) -> nn.Module:
    if recipe.norm == "batch":
        return nn.BatchNorm1d(channels)
    return nn.GroupNorm(max(1, channels // 8), channels)  # a channel of length 1 alone would be nothing


# --- SG-LoRA: plain layers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """SG-LoRA's network for values (size,) and conditions (condition,): ReLU layers with two hidden ones each.

    Encoder, conditional prior and decoder; the widths are not published.
    """

    size: int
    condition: int
    latent: int = 64
    hidden: int = 512

    def build(self) -> Cvae:
        if min(self.size, self.condition, self.latent, self.hidden) < 1:
            raise BadOption(f"{self} makes no network; expected sizes of at least 1")
        return _Layered(self)


class _Layered(Cvae):
    spread: Tensor

    def __init__(self, recipe: Layers) -> None:
        super().__init__()
        size, condition, latent = recipe.size, recipe.condition, recipe.latent
        self.reach = size
        self.encoder = _stack(size + condition, recipe.hidden, 2 * latent)
        self.expected = _stack(condition, recipe.hidden, 2 * latent)
        self.decoder = _stack(latent + condition, recipe.hidden, size)
        # how large values are in each coordinate: the layers see them divided by it, the loss as they are
        self.register_buffer("spread", torch.ones(size))

    def encode(self, values: Tensor, conditions: Tensor) -> Gaussian:
        return Gaussian(*self.encoder(torch.cat([values / self.spread, conditions], dim=1)).chunk(2, dim=1))

    def prior(self, conditions: Tensor) -> Gaussian:
        return Gaussian(*self.expected(conditions).chunk(2, dim=1))

    def decode(self, codes: Tensor, conditions: Tensor) -> Tensor:
        made: Tensor = self.decoder(torch.cat([codes, conditions], dim=1))
        return made * self.spread


def _stack(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


# --- fitting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """How a network is fitted, by Adam.

    weight: of the KL in the loss. mean: whether the squared error is averaged over coordinates (ICM-LoRA) or summed up
    (SG-LoRA). falling: the share of half a cosine by which the rate falls until the end; 1 ends at zero, 0.5 (as
    published for ICM-LoRA) at half the rate, 0 keeps it.
    """

    steps: int
    batch: int
    rate: float
    weight: float
    mean: bool
    falling: float = 1.0
    clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.rate > 0 or not self.weight >= 0 or not 0 <= self.falling <= 1:
            raise BadOption(f"{self} cannot be followed; expected steps, batch and rate above 0, falling from 0 to 1")


@dataclass(frozen=True)
class Lessons:
    """What is learned: values (n, size), whose they are (n,), and each owner's conditions (k, condition)."""

    values: Tensor
    owners: Tensor
    conditions: Sequence[Tensor]

    def draw(self, size: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        """Values and one of their owners' conditions for each: (size, ...)."""
        rows = torch.randint(len(self.values), (size,), generator=chance)
        places = torch.rand(size, generator=chance, dtype=torch.float64).tolist()
        some = [self.conditions[owner] for owner in self.owners[rows].tolist()]
        return self.values[rows], torch.stack([one[int(at * len(one))] for one, at in zip(some, places, strict=True)])


@dataclass(frozen=True)
class Fitted:
    """A network that was fitted: its recipe, its tensors by name, and what the loss was made of at the end.

    told: "error" (squared, as the loss has it) and "kl" (nats), means over the last tenth of the steps.
    """

    recipe: Convolutions | Layers
    tensors: Mapping[str, Tensor]
    told: Mapping[str, float]


def fit(
    recipe: Convolutions | Layers,
    lessons: Lessons,
    course: Course,
    *,
    spread: Tensor | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Fit a network to `error + weight * KL(q || p)`.

    spread: how large values are in each coordinate (size,), for `Layers`. progress: called after every step with the
    steps done and the loss. Equal seeds give equal tensors on equal machines with equal numbers of threads. Raises
    GenerationError where the loss is no number.
    """
    network = _fresh(recipe, course.seed)
    if spread is not None:
        network.register_buffer("spread", spread.clone())
    chance = generator(course.seed, "cvae lessons")
    optimizer = torch.optim.Adam(network.parameters(), lr=course.rate)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _falling(done / course.steps, course.falling))
    history = torch.zeros(course.steps, 2)
    with torch.enable_grad():
        for done in range(course.steps):
            loss, history[done] = objective(network, *lessons.draw(course.batch, chance), chance, course)
            if not bool(torch.isfinite(loss)):
                raise GenerationError(f"the loss is {float(loss.detach())} after {done} steps; take a lower rate")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if course.clip is not None:
                nn.utils.clip_grad_norm_(network.parameters(), course.clip)
            optimizer.step()
            rates.step()
            if progress:
                progress(done + 1, float(loss.detach()))
    error, kl = history[-max(1, course.steps // 10) :].mean(dim=0).tolist()
    state = network.state_dict().items()
    tensors = {name: tensor.detach().clone() for name, tensor in state if not name.endswith(_COUNTER)}
    return Fitted(recipe, tensors, {"error": error, "kl": kl})


def objective(
    network: Cvae, values: Tensor, conditions: Tensor, chance: torch.Generator, course: Course
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and (error, KL) of which it is made."""
    posterior, prior = network.encode(values, conditions), network.prior(conditions)
    codes = posterior.at(torch.randn(posterior.mean.shape, generator=chance))
    squares = (network.decode(codes, conditions) - padded(values, network.reach)).square()
    error = squares.mean() if course.mean else squares.sum(dim=1).mean()
    kl = divergence(posterior, prior).mean()
    return error + course.weight * kl, torch.stack([error.detach(), kl.detach()])


def padded(values: Tensor, length: int) -> Tensor:
    """Zeros after the values: (batch, length)."""
    return nn.functional.pad(values, (0, length - values.shape[1]))


def _falling(done: float, share: float) -> float:
    return (1 + math.cos(math.pi * share * done)) / 2


def _fresh(recipe: Convolutions | Layers, seed: int) -> Cvae:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe.build()


# --- fitted ---------------------------------------------------------------------------------------------------------


def rebuilt(recipe: Convolutions | Layers, tensors: Mapping[str, Tensor], *, only: str = "") -> Cvae:
    """The network as it was fitted, for use: frozen, in evaluation mode.

    only: the beginning of the tensors' names that must be there, "decoder" for a network that is to decode. Raises
    FormatError where tensors are missing or of other shapes.
    """
    with torch.device("meta"):  # nothing is drawn, and no memory taken before the shapes are known to be right
        network = recipe.build()
    try:
        missing, unexpected = network.load_state_dict(dict(tensors), strict=False, assign=True)
    except RuntimeError as error:
        raise FormatError(f"the network's tensors do not fit: {str(error).splitlines()[-1].strip()}") from None
    lost = [name for name in missing if name.startswith(only) and not name.endswith(_COUNTER)]
    if lost := [*lost, *unexpected]:
        raise FormatError(f"the network's tensors do not fit: {lost[0]} is missing or unknown")
    return network.eval().requires_grad_(False)


def recipe_json(recipe: Convolutions | Layers) -> dict[str, Any]:
    """Plain data."""
    return asdict(recipe)


def recipe_from(data: Any, kind: type[Convolutions] | type[Layers]) -> Convolutions | Layers:
    """The inverse of `recipe_json`. Raises FormatError for data of another form."""
    known = {field.name for field in fields(kind)}
    if not isinstance(data, Mapping) or set(data) != known:
        raise FormatError(f"there is no recipe of a network with {', '.join(sorted(known))}")
    if any(type(value) is not int or not 0 < value < _LIMIT for name, value in data.items() if name != "norm"):
        raise FormatError("the recipe of the network is damaged: a size is no number above 0")
    return kind(**data)
