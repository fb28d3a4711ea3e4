"""Many LoRA adapters trained at once on one frozen model, in one forward and one backward pass a step.

The batch's first axis is (adapters x samples of each); in every chosen linear layer each adapter acts on its own part
of that axis, by two batched products with stacked factors. Losses are added up, and no adapter appears in another's
loss, so what an adapter becomes does not depend on who is trained beside it: it equals training it alone, but for the
rounding of floating-point sums. The base does its work once for all of them; nothing of it is copied or changed.
Importing this needs torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.optimizer import Optimizer

from ..hub.adapter import Adapter
from ..hub.errors import BadOption, IncompatibleAdapters
from ..hub.lowrank import LowRank
from .layout import Layout
from .stacked import Group, Table

Batch = TypeVar("Batch")
Schedule = Callable[[Optimizer, int], LRScheduler]  # given the number of steps
WARM_UP = 0.1  # of all steps


@dataclass(frozen=True)
class Pupil(Generic[Batch]):
    """An adapter to be: what it learns from, and how it begins.

    batch: called with the step (from 0) and a generator that is made anew for every step from `seed`; whatever is drawn
    from it is the same in any company. rank, scale: delta = scale * up @ down (PEFT's lora_alpha = scale * rank).
    start: seed of the first `down`, by default `seed`; experts with equal starts begin at the same point, those of
    lower rank with its first rows. `up` begins at zero.
    """

    name: str
    batch: Callable[[int, torch.Generator], Batch]
    seed: int = 0
    rank: int = 4
    scale: float = 1.0
    start: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadOption(f"{self.name}: rank is {self.rank}; expected a whole number of at least 1")
        if not math.isfinite(self.scale) or not self.scale:
            raise BadOption(f"{self.name}: scale is {self.scale}; expected a finite number other than 0")


@dataclass(frozen=True)
class Trained:
    """Adapters in the order of their pupils.

    checkpoints: number of steps done -> the adapters at that point. losses: float32 (steps, adapters), each before its
    step.
    """

    adapters: tuple[Adapter, ...]
    checkpoints: Mapping[int, tuple[Adapter, ...]]
    losses: Tensor


# --- schedules ------------------------------------------------------------------------------------------------------


def constant(optimizer: Optimizer, steps: int) -> LRScheduler:
    """The rate as it is."""
    return LambdaLR(optimizer, lambda _: 1.0)


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Up in a straight line for a tenth of the steps, then down half a cosine towards zero."""
    warm = max(1, round(WARM_UP * steps))

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    return LambdaLR(optimizer, share)


def one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    """torch's OneCycleLR with a tenth of the steps to rise; it moves AdamW's first beta as well."""
    return OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=steps, pct_start=WARM_UP)


# --- training -------------------------------------------------------------------------------------------------------


def linear_paths(model: nn.Module, endings: Collection[str]) -> list[str]:
    """The model's linear layers whose path is one of `endings` or ends with a dot and one, in the model's order.

    As PEFT's target_modules. Raises BadOption for an ending that no linear layer has.
    """
    paths = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    for ending in endings:
        if not any(f".{path}".endswith(f".{ending}") for path in paths):
            raise BadOption(f"{type(model).__name__} has no linear layer {ending}; it has {', '.join(paths[:3])} ...")
    return [path for path in paths if any(f".{path}".endswith(f".{ending}") for ending in endings)]


def train(
    model: nn.Module,
    paths: Sequence[str],
    pupils: Sequence[Pupil[Batch]],
    loss: Callable[[nn.Module, Sequence[Batch]], Tensor],
    *,
    steps: int,
    rate: float = 1e-3,
    schedule: Schedule = constant,
    clip: float | None = None,
    decay: float = 0.01,
    autocast: bool = False,
    together: int | None = None,
    checkpoints: Collection[int] = (),
    component: str = "",
    base: str | None = None,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Trained:
    """One adapter for every pupil, all trained at once with AdamW; the model is left as it was.

    paths: the linear layers that learn (see `linear_paths`). loss: from the model and one batch for every pupil, one
    loss for each: (adapters,); it calls the model, as often as it likes, with as many samples of each pupil, pupil
    after pupil on the first axis. rate, schedule, decay: AdamW's, shared by all. clip: largest norm of an adapter's
    gradient, each for itself. autocast: products in bfloat16 by torch.autocast. together: adapters in one pass, by
    default all; fewer need less memory. checkpoints: numbers of steps after which the adapters are kept as well, 0 for
    what they begin with. component: the model's name in its pipeline ("transformer"), which begins the names of the
    adapters' modules. base: its name. progress: called after every step with the number of steps done and the losses.

    There is no dropout, and no global generator is used. Lower ranks are padded with zeros whose gradient is zero, so
    that AdamW leaves them exactly there.

    Raises IncompatibleAdapters for a path that is no linear layer or that the loss does not use, for a layer whose
    input does not have all samples on its first axis, and for losses that depend on other adapters; BadOption for
    numbers outside their range; LoraHubError with the pupil's name where a loss or gradient is not finite.
    """
    _check(paths, pupils, steps, checkpoints, {"rate": rate, "clip": clip, "together": together})
    layers = {path: _layer(model, path, component) for path in paths}
    table = _table(layers, pupils)
    optimizer = AdamW([table.values], lr=rate, weight_decay=decay, fused=True)
    rates = schedule(optimizer, steps)
    lesson = _Lesson(model, loss, layers, table, pupils, together or len(pupils), autocast)
    losses, kept = torch.zeros(steps, len(pupils)), {}
    with _at_rest(model):
        for done in range(steps):
            if done in checkpoints:
                kept[done] = _adapters(table, pupils, component, base, {"steps": done, "rate": rate})
            losses[done], gradient = lesson.gradient(done)
            table.values.grad = gradient if clip is None else clipped(gradient, clip)
            optimizer.step()
            rates.step()
            if progress:
                progress(done + 1, losses[done])
    kept[steps] = _adapters(table, pupils, component, base, {"steps": steps, "rate": rate})
    return Trained(kept[steps], {done: kept[done] for done in sorted(set(checkpoints))}, losses)


def clipped(gradient: Tensor, clip: float) -> Tensor:
    """Rows (adapters, parameters), those of a norm above `clip` scaled down to it; as torch's clip_grad_norm_."""
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    return gradient * torch.clamp(clip / (norms + 1e-6), max=1.0)


class _Lesson(Generic[Batch]):
    """What happens in a step: passes over all adapters, some of them in each."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Sequence[Batch]], Tensor],
        layers: Mapping[str, nn.Linear],
        table: Table,
        pupils: Sequence[Pupil[Batch]],
        together: int,
        autocast: bool,
    ) -> None:
        self.model, self.loss, self.layers, self.pupils, self.autocast = model, loss, layers, pupils, autocast
        rows = [slice(first, first + together) for first in range(0, len(pupils), together)]
        names, scales = [pupil.name for pupil in pupils], [pupil.scale for pupil in pupils]
        self.groups = [Group(table, part, names, scales) for part in rows]
        self.device = table.values.device.type

    def gradient(self, done: int) -> tuple[Tensor, Tensor]:
        """Losses (adapters,) and gradients (adapters, parameters) after `done` steps."""
        losses, gradients = [], []
        with _arithmetic(self.device, self.autocast):
            for group in self.groups:
                pupils = self.pupils[group.rows]
                batches = [pupil.batch(done, generator(pupil.seed, f"batch {done}")) for pupil in pupils]
                kind = torch.autocast(self.device, torch.bfloat16, enabled=self.autocast, cache_enabled=False)
                with group.acting(self.layers), kind:
                    loss = self.loss(self.model, batches)
                gradients.append(group.gradient(loss, done))
                losses.append(loss.detach().float().cpu())
        return torch.cat(losses), torch.cat(gradients)


@contextmanager
def _arithmetic(device: str, autocast: bool) -> Iterator[None]:
    """Gradients on, a caller's autocast off, and attention in plain products where fused ones are slow.

    On a CPU torch's fused attention in bfloat16 takes four to nine times as long (64 tokens, there and back).
    """
    attention = sdpa_kernel(SDPBackend.MATH) if autocast and device == "cpu" else nullcontext()
    with torch.enable_grad(), torch.autocast(device, enabled=False), attention:
        yield


def _check(
    paths: Sequence[str],
    pupils: Sequence[Pupil[Any]],
    steps: int,
    checkpoints: Collection[int],
    positive: Mapping[str, float | None],
) -> None:
    if not paths or len(set(paths)) < len(paths):
        raise BadOption(f"{len(paths)} paths, {len(set(paths))} of them different; expected at least one, none twice")
    if not pupils:
        raise BadOption("there is no pupil; expected at least one")
    for name, value in {"steps": steps, **positive}.items():
        if value is not None and not value > 0:
            raise BadOption(f"{name} is {value}; expected a number above 0")
    beyond = sorted(done for done in checkpoints if not 0 <= done <= steps)
    if beyond:
        raise BadOption(f"there is no checkpoint after {beyond[0]} of {steps} steps; expected 0 to {steps}")


def _layer(model: nn.Module, path: str, component: str) -> nn.Linear:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise IncompatibleAdapters(
            f"{component or type(model).__name__} has no linear layer {path}; see linear_paths for those there are"
        )
    return layer


def generator(seed: int, purpose: str) -> torch.Generator:
    """A generator that depends on nothing but the seed and what it is for."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and frozen; afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in learning:
            parameter.requires_grad_(True)


def _table(layers: Mapping[str, nn.Linear], pupils: Sequence[Pupil[Any]]) -> Table:
    """Every adapter as it begins."""
    table = Table(layers, [pupil.rank for pupil in pupils])
    for path, layer in layers.items():
        for row, pupil in zip(table.down(path), pupils, strict=True):
            row[: pupil.rank] = first_down(pupil, path, layer.in_features)
    return table


def first_down(pupil: Pupil[Any], path: str, inputs: int) -> Tensor:
    """PEFT's default, kaiming_uniform with a = sqrt(5): float32 (rank, inputs), whatever else is trained."""
    chance = generator(pupil.seed if pupil.start is None else pupil.start, f"down {path}")
    return nn.init.kaiming_uniform_(torch.empty(pupil.rank, inputs), a=math.sqrt(5), generator=chance)


def afresh(layout: Layout, seed: int = 0) -> Tensor:
    """An adapter before all training, as a vector (size,): `down` at chance, `up` zero."""
    vector = torch.zeros(layout.size)
    for place in layout.places:
        pupil: Pupil[None] = Pupil("fresh", lambda *_: None, seed=seed, rank=place.rank)
        vector[place.down] = first_down(pupil, place.name, place.inputs).flatten()
    return vector


def _adapters(
    table: Table, pupils: Sequence[Pupil[Any]], component: str, base: str | None, told: Mapping[str, Any]
) -> tuple[Adapter, ...]:
    """Copies of all adapters as they are now, without their padding."""

    def factors(row: int, pupil: Pupil[Any], path: str) -> LowRank:
        down, up = (side[row, : pupil.rank] for side in (table.down(path), table.up(path)))
        # clones, since a transposed rank of 1 is contiguous as it is, and would stay a view of the table
        return LowRank(down.clone(), up.T.clone(memory_format=torch.contiguous_format), pupil.scale)

    prefix, made = f"{component}." if component else "", []
    for row, pupil in enumerate(pupils):
        modules = {prefix + path: factors(row, pupil, path) for path in table.places}
        meta = {"name": pupil.name, "seed": pupil.seed, "start": pupil.start, "rank": pupil.rank, **told}
        made.append(Adapter(modules, base, meta=meta))
    return tuple(made)
