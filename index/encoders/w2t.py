"""The rank-token encoder of "Weights to Tokens": every singular direction of every module is a token.

W2T (arXiv 2603.15990): the canonical decomposition of each delta gives (u, sigma, v) with the largest entry of u
positive; a small Transformer over a module's directions, four learned queries that collect them, and another over the
modules. A linear map takes its vector into the space of words. Modules may be absent here, which the paper's may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...hub.adapter import Adapter
from ...hub.errors import BadOption
from ..modules import Manifest
from ._factors import by_group, canonical, joined
from ._tokens import Aside, ByKind, Centre, Features, Standard, collated, log_norms, place_order, transformer

FLOOR = 1e-3  # weaker directions, as a share of the module's strongest, are left out: rounding decides where they point
QUERIES = 4

PUBLISHED: Mapping[str, Any] = {"width": 128, "heads": 8, "rank": None, "widening": 4, "flips": False}


def w2t(
    manifest: Manifest,
    *,
    dim: int = 384,
    width: int = 64,
    rank: int | None = 4,
    layers: int = 2,
    heads: int = 4,
    widening: int = 2,
    dropout: float = 0.1,
    flips: bool = True,
) -> W2T:
    """An encoder for the manifest's modules, not yet fitted.

    rank: how many of a module's strongest directions are read, None for all. flips: while it is fitted, (u, v) is
    turned to (-u, -v) at random, since the sign says nothing.
    """
    for name, value in {"width": width, "heads": heads, "dim": dim, "layers": layers, "rank": rank or 1}.items():
        if value < 1:
            raise BadOption(f"{name} is {value}; expected a whole number of at least 1")
    if width % heads:
        raise BadOption(f"width {width} cannot be shared by {heads} heads; choose a multiple of {heads}")

    def blocks(count: int) -> nn.TransformerEncoder:
        return transformer(width, count, heads, widening=widening, dropout=dropout)

    return W2T(manifest, blocks(1), blocks(layers), width, heads, dim, rank, flips)


class W2T(nn.Module):
    """Features of adapters -> unit vectors (n, dim)."""

    def __init__(
        self,
        manifest: Manifest,
        within: nn.TransformerEncoder,
        among: nn.TransformerEncoder,
        width: int,
        heads: int,
        dim: int,
        rank: int | None,
        flips: bool,
    ) -> None:
        super().__init__()
        places = len(manifest.places)
        layers, kinds = _labels(manifest)
        self.manifest, self.heads, self.rank, self.flips = manifest, heads, rank, flips
        self.written = ByKind([group.outputs for group in manifest.groups], width)
        self.read = ByKind([group.inputs for group in manifest.groups], width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.fuse = nn.Linear(2 * width, width)
        self.film = nn.Linear(1, 2 * width)
        self.standard = Standard(places, least=1e-6)
        self.within, self.among = within, among
        self.queries = nn.Parameter(torch.randn(QUERIES, width) / width**0.5)
        self.gather = nn.Linear(QUERIES * width, width)
        self.layers = nn.Embedding(max(layers) + 1, width)
        self.kinds = nn.Embedding(max(kinds) + 1, width)
        self.absent = nn.Parameter(torch.zeros(width))
        self.attention = nn.Linear(width, 1)
        self.head = nn.Linear(width, dim)
        self.centre, self.aside = Centre(dim), Aside(dim)
        self.register_buffer("layer_of", torch.tensor(layers), persistent=False)
        self.register_buffer("kind_of", torch.tensor(kinds), persistent=False)
        self.register_buffer("order", place_order(manifest), persistent=False)

    def features(self, adapter: Adapter) -> Features:
        """What is read of one adapter. Raises IncompatibleAdapters as `Manifest.check` does."""
        deltas = canonical(adapter, self.manifest)
        _, present = log_norms(joined([each.norms for each in deltas], deltas))
        found = {"present": present}
        for index, each in enumerate(by_group([each.signed() for each in deltas], self.manifest)):
            kept = each.values >= FLOOR * each.values[:, :1]
            found[f"left {index}"] = each.left[:, :, : self.rank]
            found[f"right {index}"] = each.right[:, :, : self.rank]
            found[f"values {index}"] = (each.values * kept)[:, : self.rank]
        return found

    def prepare(self, items: Sequence[Features], targets: Tensor) -> None:
        """Before the first step of a fit: measure what is standardised or left aside; targets (n, dim)."""
        self.aside.measure(targets)
        values = self._values(collated(items))
        shape = (-1, values.shape[1])
        flat = values.transpose(1, 2).reshape(shape)
        self.standard.measure(flat.log1p(), (flat > 0).float())

    def forward(self, items: Sequence[Features], present: Tensor | None = None) -> Tensor:
        """One unit vector for each. present (n, places): zeros make modules absent that are there."""
        batch = collated(items)
        seen = batch["present"] if present is None else batch["present"] * present
        values = self._values(batch)
        modules = self._pooled(self._directions(batch, values), values)
        tokens = torch.where(seen[..., None] > 0, modules, self.absent)
        states = self.among(tokens + self.layers(self.layer_of) + self.kinds(self.kind_of))
        shares = self.attention(states).softmax(dim=1)
        unit: Tensor = self.aside(self.centre(self.head((shares * states).sum(dim=1))))
        return unit

    def _values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(n, places, rank)."""
        return self._joined([batch[f"values {index}"] for index in range(len(self.manifest.groups))])

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        longest = max(part.shape[2] for part in parts)
        spare = (0,) * (2 * (parts[0].ndim - 3))
        padded = [nn.functional.pad(part, (*spare, 0, longest - part.shape[2])) for part in parts]
        order: Any = self.order
        return torch.cat(padded, dim=1)[:, order]

    def _directions(self, batch: Mapping[str, Tensor], values: Tensor) -> Tensor:
        """Rank tokens (n, places, rank, width)."""
        written, read = [], []
        for index in range(len(self.manifest.groups)):
            left, right = batch[f"left {index}"], batch[f"right {index}"]
            if self.training and self.flips:
                signs = torch.randint(0, 2, (*left.shape[:2], 1, left.shape[3]), dtype=left.dtype) * 2 - 1
                left, right = left * signs, right * signs
            written.append(self.written(index, left.mT))
            read.append(self.read(index, right.mT))
        parts = [self.norms[0](self._joined(written)).relu(), self.norms[1](self._joined(read)).relu()]
        tokens: Tensor = self.norms[2](self.fuse(torch.cat(parts, dim=-1)))
        strength = self.standard(values.log1p().transpose(1, 2)).transpose(1, 2)
        gain, offset = self.film(strength[..., None]).chunk(2, dim=-1)
        modulated: Tensor = tokens * (1 + gain) + offset
        return modulated

    def _pooled(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Rank tokens -> module tokens (n, places, width); directions of no strength are not looked at."""
        n, places, rank, width = tokens.shape
        hidden = (values <= 0).reshape(n * places, rank)
        hidden = hidden & ~hidden.all(dim=1, keepdim=True)  # attention over nothing has no value; it is replaced later
        # as a mask for every head: torch's check of a padding mask imports sympy, which takes seconds
        barred = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None].expand(-1, rank, -1)
        mask = barred.repeat_interleave(self.heads, dim=0)
        states = self.within(tokens.reshape(n * places, rank, width), mask=mask)
        scores = states @ self.queries.T + 0.5 * values.reshape(n * places, rank, 1).log1p()
        shares = scores.masked_fill(hidden[..., None], -torch.inf).softmax(dim=1)
        pooled = shares.mT @ states
        gathered: Tensor = self.gather(pooled.reshape(n, places, QUERIES * width))
        return gathered


def _labels(manifest: Manifest) -> tuple[list[int], list[int]]:
    """For every place the number of its layer (all numbers in its path) and of its kind."""
    numbers = [tuple(int(part) for part in place.name.split(".") if part.isdigit()) for place in manifest.places]
    known = {layer: index for index, layer in enumerate(sorted(set(numbers)))}
    kinds = {kind: index for index, kind in enumerate(manifest.kinds)}
    return [known[layer] for layer in numbers], [kinds[place.kind] for place in manifest.places]
