"""Stacked factors: many adapters act in one pass of a model, each on its own part of the batch.

In a layer every adapter adds to the outputs of its own samples, by two batched products. A batch's first axis is
(adapters x samples of each), unless `owned` says whose each sample is. Importing this needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hub.errors import BadOption, IncompatibleAdapters, LoraHubError

_owners: ContextVar[Tensor | None] = ContextVar("owners", default=None)


@contextmanager
def owned(owners: Tensor) -> Iterator[None]:
    """Inside the block the model's samples, in any order and number, belong to the adapters that `owners` says.

    owners: int64 (samples,), places in the sequence of batches that the loss was given. For a loss that has its own
    idea of which samples to put together; it costs a copy of the factors for every sample.
    """
    token = _owners.set(owners)
    try:
        yield
    finally:
        _owners.reset(token)


@dataclass(frozen=True)
class _Place:
    """Where a layer's factors stand in a row of the table."""

    down: slice
    up: slice
    inputs: int
    outputs: int


class Table:
    """All factors of all adapters, one row for each adapter, so that an optimiser has one tensor to go through.

    A row holds, layer by layer, `down` (rank, inputs) and the transposed `up` (rank, outputs), with the largest of the
    ranks; everything is zero at first. values: (adapters, parameters), float32 or float64 as the layers are.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], ranks: Sequence[int]) -> None:
        self.rank = max(ranks)
        self.places: dict[str, _Place] = {}
        end = 0
        for path, layer in layers.items():
            middle, begin = end + self.rank * layer.in_features, end
            end = middle + self.rank * layer.out_features
            self.places[path] = _Place(slice(begin, middle), slice(middle, end), layer.in_features, layer.out_features)
        like = next(iter(layers.values())).weight
        self.values = like.new_zeros(len(ranks), end, dtype=torch.promote_types(like.dtype, torch.float32))

    def down(self, path: str) -> Tensor:
        """A view: (adapters, rank, inputs)."""
        place = self.places[path]
        return self.values[:, place.down].view(-1, self.rank, place.inputs)

    def up(self, path: str) -> Tensor:
        """A view, transposed: (adapters, rank, outputs)."""
        place = self.places[path]
        return self.values[:, place.up].view(-1, self.rank, place.outputs)


class Group:
    """Neighbouring rows of a table: the adapters that are in one pass."""

    def __init__(self, table: Table, rows: slice, names: Sequence[str], scales: Sequence[float]) -> None:
        self.rows, self.names = rows, names[rows]
        self.downs = {path: table.down(path)[rows].detach().requires_grad_() for path in table.places}
        self.ups = {path: table.up(path)[rows].detach().requires_grad_() for path in table.places}
        self.scales = table.values.new_tensor(scales[rows])[:, None, None]
        self._used: set[str] = set()

    @contextmanager
    def acting(self, layers: Mapping[str, nn.Linear]) -> Iterator[None]:
        """The adapters' outputs are added to the layers' inside the block."""
        with ExitStack() as hooks:
            for path, layer in layers.items():
                hooks.callback(layer.register_forward_hook(self._hook(path)).remove)
            yield

    def _hook(self, path: str) -> Callable[..., Tensor]:
        down, up, count = self.downs[path], self.ups[path], len(self.names)

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            value, kind = inputs[0], output.device.type
            owners = None if count == 1 else _owners.get()
            parts = count if owners is None else len(owners)
            if value.ndim < 2 or value.shape[0] % parts:
                raise IncompatibleAdapters(
                    f"{path} is given an input of shape {tuple(value.shape)}, whose first axis does not divide into "
                    f"{parts} parts for {count} adapters; expected all samples there: take one adapter at a time, or "
                    f"leave {path} out"
                )
            self._used.add(path)
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else down.dtype
            with torch.autocast(kind, enabled=False):
                total: Tensor = _Addition.apply(  # type: ignore[no-untyped-call]
                    value.reshape(parts, -1, value.shape[-1]).to(dtype),
                    output.reshape(parts, -1, output.shape[-1]).to(dtype),
                    down.to(dtype),
                    (up * self.scales).to(dtype),
                    owners,
                )
            return total.view(output.shape).to(output.dtype)

        return add

    def gradient(self, losses: Tensor, done: int) -> Tensor:
        """Every adapter's gradient of its own loss: (adapters, parameters), in the table's order.

        losses: (adapters,). Raises BadOption for another shape, LoraHubError for what is not finite after `done` steps.
        """
        if losses.shape != (len(self.names),):
            raise BadOption(f"the losses have shape {tuple(losses.shape)}; expected one for each of {len(self.names)}")
        self._check_finite("loss", losses.detach(), done)
        if done == 0:
            self._check_apart(losses)
        leaves = [side for path in self.downs for side in (self.downs[path], self.ups[path])]
        parts = torch.autograd.grad(losses.sum(), leaves)
        gradient = torch.cat([part.flatten(1) for part in parts], dim=1)
        self._check_finite("gradient's norm", gradient.norm(dim=1), done)
        return gradient

    def _check_finite(self, what: str, values: Tensor, done: int) -> None:
        if not bool(torch.isfinite(values).all()):
            row = int((~torch.isfinite(values)).nonzero()[0])
            raise LoraHubError(
                f"{self.names[row]}: the {what} is {float(values[row])} after {done} steps; expected a finite number: "
                "look at its data, or take a lower rate"
            )

    def _check_apart(self, losses: Tensor) -> None:
        """Every layer was used, and the first adapter's loss does not hang on the others' factors."""
        idle = sorted(set(self.downs) - self._used)
        if idle:
            raise IncompatibleAdapters(f"the loss does not use {idle[0]}: nothing can be learned there, leave it out")
        if len(self.names) == 1:
            return
        for path, part in zip(
            self.ups, torch.autograd.grad(losses[0], list(self.ups.values()), retain_graph=True), strict=True
        ):
            if bool(part[1:].any()):
                other = self.names[1 + int(part[1:].flatten(1).any(dim=1).nonzero()[0])]
                raise IncompatibleAdapters(
                    f"the loss of {self.names[0]} depends on {other} in {path}; expected samples in the adapters' "
                    "order on the first axis of the model's inputs, and losses that keep the adapters apart"
                )


class _Addition(torch.autograd.Function):
    """base + value down^T up: (parts, n, outputs) from (parts, n, inputs), with factors (adapters, rank, ...).

    Part i is adapter i's, or adapter owners[i]'s. Written out because autograd would form the transposed gradient of
    `down`, which takes four times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, base: Tensor, down: Tensor, up: Tensor, owners: Tensor | None) -> Tensor:
        ctx.adapters = len(down)
        if owners is not None:
            down, up = down[owners], up[owners]
        inner = torch.bmm(value, down.transpose(1, 2))
        ctx.save_for_backward(value, inner, down, up, owners)
        return torch.baddbmm(base, inner, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, inner, down, up, owners = ctx.saved_tensors
        of_inner = torch.bmm(gradient, up.transpose(1, 2))
        of_value = torch.bmm(of_inner, down) if ctx.needs_input_grad[0] else None
        of_down, of_up = torch.bmm(of_inner.transpose(1, 2), value), torch.bmm(inner.transpose(1, 2), gradient)
        if owners is not None:
            of_down, of_up = (
                side.new_zeros(ctx.adapters, *side.shape[1:]).index_add_(0, owners, side) for side in (of_down, of_up)
            )
        return of_value, gradient, of_down, of_up, None
