"""How gates learn: AutoLoRA's training (Li et al. 2025), and supervision by what several adapters make together.

A step draws a showcase, pictures and words of it, and other adapters that are loaded beside its own. The frozen model,
with all of them acting through the gates, shall predict what makes the picture from its own words (matched loss), and
shall not from the words of one of the others (a hinge on the mismatched loss). Importing this needs torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hub.adapter import Adapter
from ..hub.errors import BadOption, IncompatibleAdapters
from .gate_checkpoints import Run
from .gate_objectives import Noised, Objective, along, flow
from .gated import Shelf, carried, fingerprint, fused, widths
from .gates import STARTS, Gates, Recipe


@dataclass(frozen=True, eq=False)
class Showcase:
    """Pictures that adapters make, and the words for them.

    adapters: the one that was trained on the pictures; several (an extension of ours) where a picture shows what they
    make together, a style's and a content's say. pictures: (n, C, H, W) as the model takes them, latents where it works
    on latents. conditions: keyword arguments of the model, each (n, ...), that belong to the pictures one by one.
    weight: how often it is drawn, relative to others; 0 for never, though its adapters may be loaded beside others'.
    """

    adapters: tuple[Adapter, ...]
    pictures: Tensor
    conditions: Mapping[str, Tensor]
    weight: float = 1.0

    def __post_init__(self) -> None:
        count = len(self.pictures)
        if not self.adapters or not count or self.weight < 0:
            raise BadOption("a showcase needs an adapter, a picture and a weight of at least 0")
        short = [name for name, value in self.conditions.items() if len(value) != count]
        if short:
            raise BadOption(f"a showcase has {count} pictures and another number of {', '.join(short)}")


@dataclass(frozen=True)
class Settings:
    """How to train. The defaults are the published recipe, except that batch and steps are yours to choose.

    batch: pictures of one showcase in a step. rate: AdamW's, falling to 0 along a cosine over the run. fewest, most:
    how many adapters are loaded beside the showcase's own (published: one); from one to the other, all numbers are
    equally likely. blank: the chance that a picture's words are replaced by none. margin: of the hinge on the
    mismatched loss, which is left out where the others have no showcase that is free of the showcase's own adapters;
    None: no hinge. start: of new gates, see Gate. save_every: steps between checkpoints. Raises BadOption.
    """

    steps: int = 8000
    batch: int = 1
    rate: float = 1e-4
    decay: float = 0.01
    fewest: int = 1
    most: int = 1
    blank: float = 0.3
    margin: float | None = 0.5
    start: str = "published"
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.save_every) < 1:
            raise BadOption(
                f"steps {self.steps}, batch {self.batch}, save_every {self.save_every}: expected at least 1"
            )
        if not 0 <= self.fewest <= self.most:
            raise BadOption(f"fewest is {self.fewest}, most {self.most}; expected 0 <= fewest <= most")
        if not 0 <= self.blank <= 1 or self.rate <= 0 or self.decay < 0:
            raise BadOption(f"blank {self.blank}, rate {self.rate}, decay {self.decay}: expected 0 to 1, > 0, >= 0")
        if self.start not in STARTS:
            raise BadOption(f"start is {self.start!r}; expected one of {', '.join(STARTS)}")


class Progress(NamedTuple):
    """Steps done, and the last one's losses; mismatched is None where it had none."""

    step: int
    steps: int
    matched: float
    mismatched: float | None


Call = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
Companions = Callable[[Showcase, Sequence[Adapter], torch.Generator], Sequence[Adapter]]


def call_model(model: nn.Module, value: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """A diffusers transformer's or UNet's prediction; of one that predicts variances too, only the rest."""
    predicted: Tensor = model(value, timestep=time, **conditions, return_dict=False)[0]
    return predicted[:, : value.shape[1]]


# --- one step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a step is made of: the adapters to load, matched inputs, and mismatched conditions where there are any."""

    adapters: tuple[Adapter, ...]
    pictures: Tensor
    conditions: Mapping[str, Tensor]
    mismatched: Mapping[str, Tensor] | None


class Deck:
    """Showcases to draw from. Every draw is a function of the generator's state alone."""

    def __init__(
        self,
        showcases: Sequence[Showcase],
        blank: Mapping[str, Tensor],
        settings: Settings,
        companions: Companions | None = None,
    ) -> None:
        self.showcases, self.blank, self.settings, self.companions = showcases, blank, settings, companions
        self.adapters = list({adapter: None for showcase in showcases for adapter in showcase.adapters})
        self.weights = torch.tensor([showcase.weight for showcase in showcases], dtype=torch.float64)
        if not bool(self.weights.sum() > 0):
            raise BadOption("no showcase has a weight above 0: there is nothing to learn from")
        if not companions:
            room = min(len(self.adapters) - len({*showcase.adapters}) for showcase in showcases if showcase.weight)
            if room < settings.most:
                raise BadOption(
                    f"{settings.most} adapters beside a showcase's own: expected at most {room}, all there are"
                )
        lacking = {name for showcase in showcases for name in showcase.conditions} - set(blank)
        if settings.blank and lacking:
            raise BadOption(f"blank lacks {', '.join(sorted(lacking))}: what stands for no words")

    def draw(self, chance: torch.Generator) -> Drawn:
        """The next step's adapters, pictures and conditions."""
        settings = self.settings
        showcase = self.showcases[_pick(self.weights, chance)]
        others = self._others(showcase, chance)
        count = len(showcase.pictures)
        if count >= settings.batch:
            rows = torch.randperm(count, generator=chance)[: settings.batch]
        else:
            rows = torch.randint(count, (settings.batch,), generator=chance)
        silent = torch.rand(len(rows), generator=chance) < settings.blank
        conditions = {
            name: _replaced(value[rows], self.blank.get(name), silent) for name, value in showcase.conditions.items()
        }
        # in the order of the deck, so that a combination is the same one whoever of it was drawn first
        loaded = tuple(adapter for adapter in self.adapters if adapter in showcase.adapters or adapter in others)
        mismatched = self._mismatched(showcase, others, len(rows), chance)
        return Drawn(loaded, showcase.pictures[rows], conditions, mismatched)

    def _others(self, showcase: Showcase, chance: torch.Generator) -> Sequence[Adapter]:
        rest = [adapter for adapter in self.adapters if adapter not in showcase.adapters]
        if self.companions:
            chosen = self.companions(showcase, rest, chance)
            if not {*chosen} <= {*rest}:
                raise BadOption("companions chose an adapter that it was not offered")
            return chosen
        fewest, most = self.settings.fewest, self.settings.most
        count = int(torch.randint(fewest, most + 1, (), generator=chance))
        return [rest[i] for i in torch.randperm(len(rest), generator=chance)[:count].tolist()]

    def _mismatched(
        self, showcase: Showcase, others: Sequence[Adapter], count: int, chance: torch.Generator
    ) -> Mapping[str, Tensor] | None:
        """Conditions of a showcase of the first other that has one with none of this showcase's own adapters."""
        if self.settings.margin is None:
            return None
        for other in others:
            own = {*showcase.adapters}
            fitting = [one for one in self.showcases if other in one.adapters and not own.intersection(one.adapters)]
            if fitting:
                chosen = fitting[int(torch.randint(len(fitting), (), generator=chance))]
                rows = torch.randint(len(chosen.pictures), (count,), generator=chance)
                return {name: value[rows] for name, value in chosen.conditions.items()}
        return None


def _pick(weights: Tensor, chance: torch.Generator) -> int:
    return int(torch.multinomial(weights, 1, generator=chance))


def _replaced(values: Tensor, blank: Tensor | None, silent: Tensor) -> Tensor:
    """Rows of `values`, those marked `silent` replaced by the blank one, which is (1, ...)."""
    if blank is None or not bool(silent.any()):
        return values
    return torch.where(along(silent, values).to(values.device), blank.to(values), values)


def errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every picture: (batch,)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


def backward(
    predict: Callable[[Noised, Mapping[str, Tensor]], Tensor],
    drawn: Drawn,
    objective: Objective,
    margin: float | None,
    chance: torch.Generator,
) -> tuple[float, float | None]:
    """Add the gradients of L = L1 + max(0, margin - L2) to the gates', each a mean over pictures; returns L1 and L2.

    L1 is the matched error. L2 is that on the same pictures with the mismatched words, at other timesteps with other
    noise. Pictures whose hinge is inactive contribute nothing, and where all are, nothing is propagated.
    """
    noised = objective(drawn.pictures, chance)
    matched = errors(predict(noised, drawn.conditions), noised.target).mean()
    matched.backward()  # type: ignore[no-untyped-call]
    if margin is None or drawn.mismatched is None:
        return float(matched.detach()), None
    noised = objective(drawn.pictures, chance)
    mismatched = errors(predict(noised, drawn.mismatched), noised.target)
    hinge = torch.relu(margin - mismatched).mean()
    if bool((mismatched < margin).any()):
        hinge.backward()  # type: ignore[no-untyped-call]
    return float(matched.detach()), float(mismatched.detach().mean())


# --- the run --------------------------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    showcases: Sequence[Showcase],
    blank: Mapping[str, Tensor],
    gates: Gates | Recipe,
    settings: Settings | None = None,
    *,
    component: str,
    objective: Objective | None = None,
    call: Call = call_model,
    companions: Companions | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Gates:
    """Gates that were trained on showcases; the model and the adapters stay as they are.

    blank: what stands for no words, for every condition (1, ...). gates: where to start from (left as they are), or
    the recipe of new ones for all linear layers that the adapters change. objective: by default `flow()`. call: runs
    the model, for those that need more arguments. companions: chooses, of the adapters that are not the showcase's own,
    those that are loaded beside them. checkpoint: a file that is written from time to time and resumed from, with the
    same result as without a break; the caller may delete it at the end. Everything random follows from settings.seed;
    the global random state is neither used nor changed. Raises BadOption; IncompatibleAdapters and FormatError for a
    checkpoint of another run.
    """
    settings, objective = settings or Settings(), objective or flow()
    deck = Deck(showcases, blank, settings, companions)
    learning = _learning(model, deck.adapters, gates, settings, component)
    optimiser = torch.optim.AdamW(learning.parameters(), lr=settings.rate, weight_decay=settings.decay, fused=True)
    run = Run(learning, optimiser, _identity(model, deck, settings, learning))
    begin, shelf = run.resume(checkpoint), Shelf()
    with _frozen(model):
        for step in range(begin, settings.steps):
            chance = torch.Generator().manual_seed(_seed(settings.seed, step))
            drawn = _moved(deck.draw(chance), model)
            optimiser.param_groups[0]["lr"] = settings.rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
            optimiser.zero_grad(set_to_none=True)  # a gate that a step does not use stays as it is
            with torch.enable_grad(), fused(model, drawn.adapters, learning, component=component, shelf=shelf):
                losses = backward(
                    lambda noised, conditions: call(model, noised.value, noised.time, conditions),
                    drawn, objective, settings.margin, chance,
                )  # fmt: skip
            optimiser.step()
            if checkpoint and ((step + 1) % settings.save_every == 0 or step + 1 == settings.steps):
                run.save(checkpoint, step + 1)
            if progress:
                progress(Progress(step + 1, settings.steps, *losses))
    return learning.requires_grad_(False)


def _learning(
    model: nn.Module, adapters: Sequence[Adapter], gates: Gates | Recipe, settings: Settings, component: str
) -> Gates:
    """The gates to train, on the model's device: a copy of those given, or new ones."""
    if isinstance(gates, Recipe):
        layers = widths(model, list(carried(adapters, [1.0] * len(adapters), component)))
        learning = Gates(layers, gates, seed=settings.seed, start=settings.start)
    else:
        learning = deepcopy(gates)
    if not learning.paths:
        raise IncompatibleAdapters(
            f"the adapters change no linear layer of {component or 'the model'}: nothing to gate"
        )
    return learning.to(next(model.parameters()).device).requires_grad_(True)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model without dropout and without gradients of its own; afterwards as it was."""
    modes = {module: module.training for module in model.modules()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


def _moved(drawn: Drawn, model: nn.Module) -> Drawn:
    device = next(model.parameters()).device

    def on(some: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in some.items()}

    mismatched = None if drawn.mismatched is None else on(drawn.mismatched)
    return Drawn(drawn.adapters, drawn.pictures.to(device), on(drawn.conditions), mismatched)


def _seed(seed: int, step: int) -> int:
    """Each step has a random state of its own, so that a resumed run needs no other memory than the step's number."""
    return int.from_bytes(hashlib.blake2b(f"{seed} step {step}".encode(), digest_size=7).digest(), "little")


def _identity(model: nn.Module, deck: Deck, settings: Settings, gates: Gates) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed from."""
    digest = hashlib.sha256()
    tensors = [*gates.tensors().values(), *deck.blank.values()]
    for showcase in deck.showcases:
        tensors += [showcase.pictures, *showcase.conditions.values()]
        digest.update(repr([deck.adapters.index(adapter) for adapter in showcase.adapters]).encode())
    for tensor in tensors:
        sample = tensor.flatten()[:: max(1, tensor.numel() // 64)].double().cpu()
        digest.update(f"{tuple(tensor.shape)} ".encode() + sample.numpy().tobytes())
    digest.update(repr([showcase.weight for showcase in deck.showcases]).encode())
    return {
        "settings": {name: value for name, value in asdict(settings).items() if name != "save_every"},
        "recipe": asdict(gates.recipe),
        "base": fingerprint(model),
        "adapters": [adapter.name for adapter in deck.adapters],
        "material": digest.hexdigest(),
    }
