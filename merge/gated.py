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
from ..hub.lowrank import LowRank, concat
from ..hub.writing import replacing
from .gates import Gate, Gates, Recipe, recipe_of

METADATA_KEY = "lorahub_gates"

Watch = Callable[[str, Tensor, float | None], None]  # path, g, timestep


@dataclass
class _Clock:
    """The timestep of the forward pass that is under way: (batch,), or None before the first."""

    time: Tensor | None = None


@contextmanager
def fused(
    model: nn.Module,
    adapters: Sequence[Adapter],
    gates: Gates | None = None,
    weights: Sequence[float] | None = None,
    *,
    component: str = "",
    watch: Watch | None = None,
) -> Iterator[nn.Module]:
    """The model, with adapters acting on it inside the block.

    gates: None adds weight_i * delta_i x, as diffusers' `set_adapters` does; with gates their sum is gated, except in
    convolutions, which have none. weights: multiply deltas, default 1. component: the model's name in its pipeline
    ("unet", "transformer"), with which the adapters' modules begin; modules of other components are left alone. watch:
    is called with the gates' openings whenever a layer runs. Raises IncompatibleAdapters for a module that the model or
    the gates do not have, and where shapes differ.
    """
    shares = [1.0] * len(adapters) if weights is None else list(weights)
    clock = _Clock()
    with ExitStack() as hooks:
        if (gates is not None and gates.recipe.timestep) or watch:
            handle = model.register_forward_pre_hook(_telling(model, clock), with_kwargs=True)
            hooks.callback(handle.remove)
        for path, parts in sorted(carried(adapters, shares, component).items()):
            layer = _layer(model, path, parts, component)
            like = layer.weight
            held = [part.to(like.dtype) for part in map(_on(like.device), parts)]
            if gates is None or not isinstance(layer, nn.Linear):
                hook = _adding(layer, held)
            elif path not in gates:
                raise IncompatibleAdapters(f"there is no gate for {path}: these gates were made for other layers")
            else:
                hook = _gating(gates.at(path), gates.recipe, held, clock, path, watch)
            hooks.callback(layer.register_forward_hook(hook).remove)
        yield model


def carried(adapters: Sequence[Adapter], weights: Sequence[float], component: str) -> dict[str, list[LowRank]]:
    """Path in the model -> the weighted deltas that adapters have for it."""
    prefix = f"{component}." if component else ""
    found: dict[str, list[LowRank]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name in adapter.shapes:
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), []).append(adapter.modules[name].scaled(weight))
    return found


def widths(model: nn.Module, paths: Sequence[str]) -> dict[str, int]:
    """Path -> outputs of those of the model's layers that are linear: what `Gates` is made from."""
    layers = {path: model.get_submodule(path) for path in paths}
    return {path: layer.out_features for path, layer in layers.items() if isinstance(layer, nn.Linear)}


def _layer(model: nn.Module, path: str, parts: Sequence[LowRank], component: str) -> Any:
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
    for part in parts:
        if (part.up.shape[0], part.down.shape[1]) != (rows, columns):
            raise IncompatibleAdapters(
                f"{path} is {rows}x{columns} in the model and {part.shape} in an adapter: it is for another base"
            )
    return layer


def _on(device: torch.device) -> Callable[[LowRank], LowRank]:
    def move(part: LowRank) -> LowRank:
        folded = part.folded()
        return LowRank(folded.down.to(device), folded.up.to(device), 1.0, part.kernel, part.embedding)

    return move


def _adding(layer: nn.Module, parts: Sequence[LowRank]) -> Callable[..., Tensor]:
    """A hook that adds the deltas' outputs: all of them are one, by stacked factors."""
    total = concat(parts).to(parts[0].dtype)
    return lambda _, inputs, output: output + _outputs(layer, total, inputs[0])


def _gating(
    gate: Gate, recipe: Recipe, parts: Sequence[LowRank], clock: _Clock, path: str, watch: Watch | None
) -> Callable[..., Tensor]:
    members = list(parts)
    if recipe.global_rank:
        members.append(concat(parts).truncate(recipe.global_rank).to(parts[0].dtype))
    down = torch.cat([part.down for part in members])
    ranks = [part.rank for part in members]

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inner = torch.split(nn.functional.linear(inputs[0], down), ranks, dim=-1)
        deltas = torch.stack([nn.functional.linear(one, part.up) for one, part in zip(inner, members, strict=True)])
        if watch:
            watch(path, gate.openings(output, deltas, clock.time), None if clock.time is None else float(clock.time[0]))
        return gate(output, deltas, clock.time)  # type: ignore[no-any-return]

    return hook


def _outputs(layer: nn.Module, part: LowRank, value: Tensor) -> Tensor:
    """delta applied to a layer's input."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(nn.functional.linear(value, part.down), part.up)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    down = part.down.reshape(part.rank, *layer.weight.shape[1:])
    convolve: Any = nn.functional.conv1d if isinstance(layer, nn.Conv1d) else nn.functional.conv2d
    inner = convolve(value, down, None, layer.stride, layer.padding, layer.dilation)
    result: Tensor = convolve(inner, part.up.reshape(*part.up.shape, *(1,) * (down.ndim - 2)))
    return result


def _telling(model: nn.Module, clock: _Clock) -> Callable[..., None]:
    """A hook that notes the timestep that the model is called with."""
    signature = inspect.signature(model.forward)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = signature.bind_partial(*args, **kwargs).arguments.get("timestep")
        clock.time = None if time is None else torch.as_tensor(time).reshape(-1)

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
