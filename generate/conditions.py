"""ICM-LoRA's task vectors: what a tuned model's last layer says while it works on a task's samples.

They need the task's own adapter. Importing this needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..hub.adapter import Adapter
from ..hub.errors import BadOption, IncompatibleAdapters
from .library import Vectors
from .stacked import Group, Table


@contextmanager
def tuned(model: nn.Module, adapter: Adapter, *, component: str = "") -> Iterator[nn.Module]:
    """The model with an adapter acting on its linear layers inside the block; its parameters are not touched.

    component: the model's name in its pipeline, with which the adapter's modules begin. Raises IncompatibleAdapters for
    a module that is no linear layer of the model, or of another shape.
    """
    prefix = f"{component}." if component else ""
    layers = {name.removeprefix(prefix): _layer(model, name, prefix, adapter) for name in adapter.modules}
    table = Table(layers, [max(shape.rank for shape in adapter.shapes.values())])
    for path in layers:
        module = adapter.modules[prefix + path].folded()
        table.down(path)[0, : module.rank], table.up(path)[0, : module.rank] = module.down, module.up.T
    with Group(table, slice(0, 1), [adapter.name], [1.0]).acting(layers):
        yield model


@torch.no_grad()
def task_vector(
    model: nn.Module,
    layer: str,
    samples: Iterable[Any],
    *,
    acting: AbstractContextManager[Any] | None = None,
    position: Literal["last", "mean", "first"] = "last",
    run: Callable[[Any], object] | None = None,
) -> Vectors:
    """The average of a layer's output over samples, and over the calls of a sample: float32 (dim,).

    layer: path of the last layer, whose output (or its first part) is (samples, tokens, dim). samples: batches that the
    model is called with, tensors or mappings; an "attention_mask" (samples, tokens) in them says which tokens count.
    acting: a context in which the model is tuned to the task, `tuned(model, adapter)` or `merge.gated.fused(model,
    [adapter])`; None for the bare model. position: "last" is ICM-LoRA's last token, "mean" over the tokens and "first"
    suit encoders. run: how a batch is run, for a decoder `lambda batch: model.generate(**batch)`, whose every step then
    counts, as published. The model is run as it is: put it in evaluation mode. Raises BadOption for options outside
    their range and for no samples.
    """
    if position not in ("last", "mean", "first"):
        raise BadOption(f"position is {position!r}; expected last, mean or first")
    watched, seen = _watched(model, layer), list[Tensor]()
    total, count = torch.zeros((), dtype=torch.float64), 0
    with ExitStack() as stack:
        stack.enter_context(acting if acting is not None else nullcontext())
        # after the adapter's own hooks: what they add to this very layer is seen as well
        stack.callback(watched.register_forward_hook(lambda _, __, output: seen.append(_first(output))).remove)
        for batch in samples:
            seen.clear()
            _run(model, batch, run)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            read = torch.stack([_read(states, mask, position).mean(dim=0) for states in _checked(seen)])
            total = total + read.mean(dim=0) * len(seen[0])
            count += len(seen[0])
    if not count:
        raise BadOption("there is no sample; expected at least one batch")
    return np.asarray((total / count).float().numpy(), dtype=np.float32)


def _run(model: nn.Module, batch: Any, run: Callable[[Any], object] | None) -> None:
    if run is not None:
        run(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch)


def _first(output: Any) -> Tensor:
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states.detach().double().cpu()


def _checked(seen: list[Tensor]) -> list[Tensor]:
    if not seen or any(states.ndim != 3 for states in seen):
        found = tuple(seen[0].shape) if seen else "nothing"
        raise BadOption(f"the layer puts out {found}; expected (samples, tokens, dim): name another layer")
    return seen


def _read(states: Tensor, mask: Tensor | None, position: str) -> Tensor:
    """(samples, dim) in float64."""
    shape = states.shape[:2]
    seen = torch.ones(shape) if mask is None or mask.shape != shape else mask.cpu()
    if position == "first":
        return states[:, 0]
    if position == "last":
        places = torch.arange(shape[1]).expand(shape)
        seen = places == torch.where(seen > 0, places, -1).max(dim=1, keepdim=True).values
    shares = seen.double()[..., None]
    return (states * shares).sum(dim=1) / shares.sum(dim=1).clamp_min(1)


def _watched(model: nn.Module, layer: str) -> nn.Module:
    try:
        return model.get_submodule(layer)
    except AttributeError:
        raise BadOption(f"{type(model).__name__} has no layer {layer!r}; expected the path of its last layer") from None


def _layer(model: nn.Module, name: str, prefix: str, adapter: Adapter) -> nn.Linear:
    try:
        layer = model.get_submodule(name.removeprefix(prefix)) if name.startswith(prefix) else None
    except AttributeError:
        layer = None
    shape = adapter.shapes[name]
    if not isinstance(layer, nn.Linear) or (layer.out_features, layer.in_features) != (shape.outputs, shape.inputs):
        raise IncompatibleAdapters(
            f"{adapter.name} changes {name} by {shape}, which is no linear layer of that size in "
            f"{type(model).__name__}; expected an adapter of this model"
        )
    return layer
