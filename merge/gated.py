"""Adapters that act at run time: their outputs are added to a model's linear layers, through gates or as a plain sum.

Nothing is merged into weights and no parameter of the model is touched: hooks add to what layers put out, and are gone
when the block ends. Works on any transformer or UNet of diffusers, and on any other model of linear layers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hub.adapter import Adapter
from ..hub.errors import FormatError, IncompatibleAdapters
from ..hub.lowrank import LowRank, Shape, concat
from ..hub.writing import replacing
from .gates import Folded, Gate, Gates, recipe_of, waves

METADATA_KEY = "lorahub_gates"

Watch = Callable[[str, Tensor, float | None], None]  # path, g, timestep
PIECE = 2**18  # on a CPU, large outputs pass through gates in pieces of so many numbers, which its caches hold


class Shelf:
    """What adapters need to act on one model, made once and kept, for those who load the same ones again and again.

    Holds every adapter's factors as the model's layers take them, and the global adapter's of each combination.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[Adapter, str, float], LowRank] = {}
        self._joint: dict[tuple[tuple[tuple[Adapter, float], ...], str, int], LowRank] = {}

    def part(self, adapter: Adapter, name: str, weight: float, like: Tensor) -> LowRank:
        """weight * an adapter's delta with scale 1, of the dtype and on the device of `like`."""
        key = (adapter, name, weight)
        if key not in self._parts:
            folded = adapter.modules[name].scaled(weight).folded()
            down, up = folded.down.detach().to(like), folded.up.detach().to(like)
            self._parts[key] = LowRank(down, up, 1.0, folded.kernel, folded.embedding)
        return self._parts[key]

    def joint(self, owners: Sequence[_Owner], parts: Sequence[LowRank], rank: int) -> LowRank:
        """The best approximation of the parts' sum, of this rank: the global adapter."""
        key = (tuple((owner.adapter, owner.weight) for owner in owners), owners[0].name, rank)
        if key not in self._joint:
            self._joint[key] = concat(parts).truncate(rank).to(parts[0].dtype)
        return self._joint[key]


@dataclass(frozen=True)
class _Owner:
    """Whose delta: adapter, name of its module, weight."""

    adapter: Adapter
    name: str
    weight: float


@dataclass
class _Clock:
    """The timestep of the forward pass that is under way, (batch,), and its `waves`; None before the first."""

    time: Tensor | None = None
    features: Tensor | None = None


@contextmanager
def fused(
    model: nn.Module,
    adapters: Sequence[Adapter],
    gates: Gates | None = None,
    weights: Sequence[float] | None = None,
    *,
    component: str = "",
    watch: Watch | None = None,
    shelf: Shelf | None = None,
    when: Callable[[], bool] | None = None,
) -> Iterator[nn.Module]:
    """The model, with adapters acting on it inside the block.

    gates: None adds weight_i * delta_i x, as diffusers' `set_adapters` does; with gates their sum is gated, except in
    convolutions, which have none. weights: multiply deltas, default 1. component: the model's name in its pipeline
    ("unet", "transformer"), with which the adapters' modules begin; modules of other components are left alone. watch:
    is called with the gates' openings whenever a layer runs. shelf: keeps what is prepared here for further blocks on
    the same model. when: asked whenever a layer runs, whether the adapters act in it. Raises IncompatibleAdapters for
    a module that the model or the gates do not have, and where shapes differ.
    """
    shares = [1.0] * len(adapters) if weights is None else list(weights)
    clock, shelf = _Clock(), shelf or Shelf()
    with ExitStack() as hooks:
        timed = gates is not None and gates.recipe.timestep
        if timed or watch:
            handle = model.register_forward_pre_hook(_telling(model, clock, with_waves=timed), with_kwargs=True)
            hooks.callback(handle.remove)
        for path, owners in sorted(_owners(adapters, shares, component).items()):
            layer = _layer(model, path, [owner.adapter.shapes[owner.name] for owner in owners], component)
            parts = [shelf.part(one.adapter, one.name, one.weight, layer.weight.detach()) for one in owners]
            if gates is None or not isinstance(layer, nn.Linear):
                hook = _adding(layer, parts)
            elif path not in gates:
                raise IncompatibleAdapters(f"there is no gate for {path}: these gates were made for other layers")
            else:
                if gates.recipe.global_rank:
                    parts.append(shelf.joint(owners, parts, gates.recipe.global_rank))
                hook = _gating(gates.at(path), parts, clock, path, watch)
            hooks.callback(layer.register_forward_hook(_asking(when, hook) if when else hook).remove)
        yield model


def _owners(adapters: Sequence[Adapter], weights: Sequence[float], component: str) -> dict[str, list[_Owner]]:
    """Path in the model -> whose deltas it takes."""
    prefix = f"{component}." if component else ""
    found: dict[str, list[_Owner]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name in adapter.shapes:
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), []).append(_Owner(adapter, name, weight))
    return found


def carried(adapters: Sequence[Adapter], weights: Sequence[float], component: str) -> dict[str, list[LowRank]]:
    """Path in the model -> the weighted deltas that adapters have for it."""
    return {
        path: [one.adapter.modules[one.name].scaled(one.weight) for one in owners]
        for path, owners in _owners(adapters, weights, component).items()
    }


def widths(model: nn.Module, paths: Sequence[str]) -> dict[str, int]:
    """Path -> outputs of those of the model's layers that are linear: what `Gates` is made from."""
    layers = {path: model.get_submodule(path) for path in paths}
    return {path: layer.out_features for path, layer in layers.items() if isinstance(layer, nn.Linear)}


def _layer(model: nn.Module, path: str, shapes: Sequence[Shape], component: str) -> Any:
    """The layer that deltas are for, checked."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        raise IncompatibleAdapters(
            f"{component or type(model).__name__} has no linear layer or convolution {path}: "
            "the adapter is for another base"
        )
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    for shape in shapes:
        if (shape.outputs, shape.inputs) != (rows, columns):
            raise IncompatibleAdapters(
                f"{path} is {rows}x{columns} in the model and {shape} in an adapter: it is for another base"
            )
    return layer


# --- what runs in a layer ---------------------------------------------------------------------------------------------


def _asking(when: Callable[[], bool], hook: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    """The hook, which does nothing unless it is told to."""
    return lambda layer, inputs, output: hook(layer, inputs, output) if when() else None


def _adding(layer: nn.Module, parts: Sequence[LowRank]) -> Callable[..., Tensor]:
    """A hook that adds the deltas' outputs: all of them are one, by stacked factors."""
    total = concat(parts).to(parts[0].dtype)
    if not isinstance(layer, nn.Linear):
        return lambda _, inputs, output: output + _convolved(layer, total, inputs[0])
    down, up = total.down, total.up.T

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inner = nn.functional.linear(inputs[0], down)
        return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), up).view(output.shape)

    return hook


def _gating(
    gate: Gate, parts: Sequence[LowRank], clock: _Clock, path: str, watch: Watch | None
) -> Callable[..., Tensor]:
    outputs, current = _stacked(parts), _folding(gate)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        folded = current(output)
        base, value = output.flatten(0, -2), inputs[0].flatten(0, -2)
        shift = None if clock.features is None else gate.shift(clock.features, output.ndim)
        if shift is not None:
            shift = shift.to(output).expand(output.shape).flatten(0, -2)
        rows = max(1, PIECE // (len(parts) * base.shape[1]))
        if watch or torch.is_grad_enabled() or len(base) <= rows or base.is_cuda:
            deltas = outputs(value)
            openings = folded.openings(base, deltas, shift)
            if watch:
                time = None if clock.time is None else float(clock.time[0])
                watch(path, openings.detach().clone().view(len(parts), *output.shape), time)
            return folded.through(base, deltas, openings).view(output.shape)
        result = torch.empty_like(base)
        for start in range(0, len(base), rows):
            piece = slice(start, start + rows)
            deltas = outputs(value[piece])
            openings = folded.openings(base[piece], deltas, None if shift is None else shift[piece])
            folded.through(base[piece], deltas, openings, into=result[piece])
        return result.view(output.shape)

    return hook


def _stacked(parts: Sequence[LowRank]) -> Callable[[Tensor], Tensor]:
    """Inputs (tokens, inputs) -> the deltas' outputs (n, tokens, outputs).

    One product with all `down` together; for `up` one batched product with factors that zeros fill up to the largest
    rank, unless ranks differ so much that this would waste more than it saves.
    """
    ranks = [part.rank for part in parts]
    most, count = max(ranks), len(parts)
    if count * most > 2 * sum(ranks):
        down, ups = torch.cat([part.down for part in parts]), [part.up for part in parts]

        def apart(value: Tensor) -> Tensor:
            inner = torch.split(nn.functional.linear(value, down), ranks, dim=-1)
            return torch.stack([nn.functional.linear(one, up) for one, up in zip(inner, ups, strict=True)])

        return apart
    down = parts[0].down.new_zeros(count, most, parts[0].down.shape[1])
    up = parts[0].up.new_zeros(count, most, parts[0].up.shape[0])
    for i, part in enumerate(parts):
        down[i, : part.rank], up[i, : part.rank] = part.down, part.up.T
    down = down.flatten(0, 1)

    def together(value: Tensor) -> Tensor:
        inner = nn.functional.linear(value, down)
        return torch.bmm(inner.view(-1, count, most).transpose(0, 1), up)

    return together


def _folding(gate: Gate) -> Callable[[Tensor], Folded]:
    """The gate as it is now, folded for a layer's output: anew where gradients must pass or a parameter has changed."""
    parameters = list(gate.parameters())
    kept: dict[Any, Folded] = {}

    def current(like: Tensor) -> Folded:
        if torch.is_grad_enabled() and parameters[0].requires_grad:
            return gate.folded().like(like)
        key = (like.dtype, like.device, *(0 if one.is_inference() else one._version for one in parameters))
        if key not in kept:
            kept.clear()
            with torch.no_grad():
                kept[key] = gate.folded().like(like)
        return kept[key]

    return current


def _convolved(layer: nn.Module, part: LowRank, value: Tensor) -> Tensor:
    """delta applied to a convolution's input."""
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    down = part.down.reshape(part.rank, *layer.weight.shape[1:])
    convolve: Any = nn.functional.conv1d if isinstance(layer, nn.Conv1d) else nn.functional.conv2d
    inner = convolve(value, down, None, layer.stride, layer.padding, layer.dilation)
    result: Tensor = convolve(inner, part.up.reshape(*part.up.shape, *(1,) * (down.ndim - 2)))
    return result


def _telling(model: nn.Module, clock: _Clock, *, with_waves: bool) -> Callable[..., None]:
    """A hook that notes the timestep that the model is called with."""
    signature = inspect.signature(model.forward)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = signature.bind_partial(*args, **kwargs).arguments.get("timestep")
        clock.time = None if time is None else torch.as_tensor(time).reshape(-1)
        clock.features = waves(clock.time) if with_waves and clock.time is not None else None

    return note


# --- gates on disk --------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's structure and of a sample of its values: which base gates belong to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sample = tensor.flatten()[:: max(1, tensor.numel() // 64)].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def save_gates(gates: Gates, path: Path, model: nn.Module, *, force: bool = False) -> None:
    """Write gates as safetensors, with their recipe and the fingerprint of the model that they were trained on.

    Raises TargetExists, FormatError where the file cannot be written.
    """
    from safetensors.torch import save

    settings = {"recipe": asdict(gates.recipe), "widths": gates.widths, "base": fingerprint(model)}
    content = save(gates.tensors(), metadata={METADATA_KEY: json.dumps(settings, sort_keys=True)})
    with replacing(path, force=force) as place:
        place.write_bytes(content)


def load_gates(path: Path, model: nn.Module | None = None) -> Gates:
    """Gates as they were saved. Raises FormatError for a file that holds none, IncompatibleAdapters for those of
    another model than `model`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            settings: Mapping[str, Any] = json.loads((file.metadata() or {})[METADATA_KEY])
            gates = Gates(settings["widths"], recipe_of(settings["recipe"]))
            gates.take({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FormatError(f"{path} holds no gates ({error}); expected a file that lorahub wrote") from None
    if model is not None and settings["base"] != fingerprint(model):
        raise IncompatibleAdapters(f"{path}: these gates were trained on another base than the one at hand")
    return gates
