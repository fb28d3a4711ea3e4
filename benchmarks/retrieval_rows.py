"""The rows of retrieval.py's table: ways to say which adapters a text, or another adapter, is near to.

A row gives cosines between all adapters of the pool, and scores of all adapters for texts. Rows without a text side
(flat weights, deltas, sketches, spectra) take two hops: from a text to the HOPS described adapters nearest to it, among
those that encoders learn from, and on to what their weights are near to. The ceiling searches true descriptions, one
wording of each adapter's, and never looks at weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.plugins import load
from lorahub.index.encoders.text import TextEncoder
from lorahub.index.fitting import Example, Settings, fit
from lorahub.index.weight_encoder import WeightEncoder
from numpy.typing import NDArray
from retrieval_pool import Pool
from retrieval_splits import Concept
from torch import Tensor

HOPS = 3
PLUGINS = ("columns", "spectral", "probe")
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Ranking:
    """near: (adapters, adapters) cosines. texts: wordings to scores (wordings, adapters). seconds: what making the
    row's encoder took, and encoding all adapters with it. encoder: the fitted one, if the row has one."""

    near: Array
    texts: Callable[[Sequence[str]], Array]
    seconds: Mapping[str, float] = field(default_factory=dict)
    encoder: WeightEncoder | None = None


@dataclass(frozen=True)
class Recipe:
    """A learned row: kind and options of `fit`, and what its settings have of their own."""

    label: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Remembering:
    """A text encoder that reads equal texts once."""

    words: TextEncoder
    known: dict[str, Array] = field(default_factory=dict)

    @property
    def space(self) -> str:
        return self.words.space

    @property
    def dim(self) -> int:
        return self.words.dim

    def encode(self, texts: Sequence[str]) -> Array:
        """Unit vectors (n, dim)."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.known.update(zip(new, self.words.encode(new), strict=True) if new else ())
        return np.stack([self.known[text] for text in texts])


class Bench:
    """A pool, described; what does not depend on the split is computed once."""

    def __init__(self, pool: Pool, concepts: Sequence[Concept], words: TextEncoder) -> None:
        self.pool, self.words = pool, words
        self.concepts = {one.name: one for one in concepts}
        # the wording that an adapter's own description has; encoders are told all of them
        told = [self.concepts[copy.concept].told for copy in pool.copies]
        self.said = [some[copy.number % len(some)] for some, copy in zip(told, pool.copies, strict=True)]
        self.described = words.encode(self.said)
        self._plain: dict[str, Array] = {}

    def plain(self, label: str) -> Array:
        """Cosines between all adapters by a measure that needs no training."""
        if label not in self._plain:
            self._plain[label] = _measures()[label](self.pool.adapters)
        return self._plain[label]

    def examples(self, parts: Sequence[str]) -> list[Example]:
        """What an encoder may learn from."""
        rows = zip(self.pool.copies, self.pool.adapters, parts, strict=True)
        return [
            Example(adapter, self.concepts[copy.concept].told, copy.concept)
            for copy, adapter, part in rows
            if part == "fit"
        ]

    def hops(self, near: Array, parts: Sequence[str]) -> Callable[[Sequence[str]], Array]:
        """Texts to adapters by way of the described ones."""
        fitted = np.array([row for row, part in enumerate(parts) if part == "fit"])

        def texts(wordings: Sequence[str]) -> Array:
            cosines = self.words.encode(wordings) @ self.described[fitted].T
            first = np.argsort(-cosines, axis=1, kind="stable")[:, :HOPS]
            found: Array = near[fitted[first]].mean(axis=1)
            return found

        return texts


def rankings(bench: Bench, parts: Sequence[str], seed: int, recipes: Sequence[Recipe]) -> Iterator[tuple[str, Ranking]]:
    """All rows but chance, for one split and seed."""
    for label in _measures():
        start = time.perf_counter()
        near = bench.plain(label)
        yield label, Ranking(near, bench.hops(near, parts), {"encoding": time.perf_counter() - start})
    for recipe in recipes:
        yield recipe.label, learned(bench, parts, seed, recipe)

    def described(wordings: Sequence[str]) -> Array:
        found: Array = bench.words.encode(wordings) @ bench.described.T
        return found

    yield "ceiling: true descriptions", Ranking(bench.described @ bench.described.T, described)


def learned(bench: Bench, parts: Sequence[str], seed: int, recipe: Recipe) -> Ranking:
    """A fitted encoder's row."""
    start = time.perf_counter()
    settings = Settings(**{"seed": seed, **recipe.settings})
    encoder = fit(recipe.kind, bench.examples(parts), bench.words, settings, options=recipe.options)
    fitted = time.perf_counter()
    vectors = encoder.encode_all(bench.pool.adapters)
    seconds = {"fit": fitted - start, "encoding": time.perf_counter() - fitted}

    def texts(wordings: Sequence[str]) -> Array:
        return encoder.scores(bench.words.encode(wordings), vectors)

    return Ranking(vectors @ vectors.T, texts, seconds, encoder)


# --- measures that need no training ---------------------------------------------------------------------------------


def _measures() -> dict[str, Callable[[Sequence[Adapter]], Array]]:
    return {"flat weights": flat, "delta cosine": delta} | {name: _plugin(name) for name in PLUGINS}


def _plugin(name: str) -> Callable[[Sequence[Adapter]], Array]:
    """Cosines of the vectors of a weight space of lorahub's."""

    def measure(adapters: Sequence[Adapter]) -> Array:
        encode = load("lorahub.index.encoders", name)
        vectors = torch.stack([encode(adapter).float() for adapter in adapters])
        return _cosines(vectors @ vectors.T)

    return measure


def flat(adapters: Sequence[Adapter]) -> Array:
    """Cosines of all factors in one long vector, as the files hold them; a lower rank is padded with zeros."""
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in _modules(adapters):
        for side in ("down", "up"):
            rows = _padded(adapters, name, side).flatten(1)
            gram += (rows @ rows.T).double()
    return _cosines(gram)


def delta(adapters: Sequence[Adapter]) -> Array:
    """Exact cosines of the deltas, which are never multiplied out: <U D, U' D'> = sum of (U^T U') * (D D'^T)."""
    count = len(adapters)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for name in _modules(adapters):
        downs, ups = _padded(adapters, name, "down"), _padded(adapters, name, "up")
        scales = torch.tensor([one.modules[name].scale if name in one.modules else 0.0 for one in adapters])
        rank = downs.shape[1]
        left, right = ((side @ side.T) for side in (one.flatten(0, 1) for one in (ups, downs)))
        inner = (left * right).view(count, rank, count, rank).sum(dim=(1, 3))
        gram += (inner * scales[:, None] * scales).double()
    return _cosines(gram)


def _modules(adapters: Sequence[Adapter]) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))


def _padded(adapters: Sequence[Adapter], name: str, side: str) -> Tensor:
    """A module's factors with their ranks first: (adapters, largest rank, inputs or outputs)."""
    parts = [one.modules.get(name) for one in adapters]
    factors = [None if part is None else (part.down if side == "down" else part.up.T) for part in parts]
    known = [factor for factor in factors if factor is not None]
    stacked = torch.zeros(len(parts), max(len(factor) for factor in known), known[0].shape[1])
    for row, factor in zip(stacked, factors, strict=True):
        if factor is not None:
            row[: len(factor)] = factor
    return stacked


def _cosines(gram: Tensor) -> Array:
    norms = gram.diagonal().clamp(min=1e-24).sqrt()
    found: Array = (gram / norms[:, None] / norms).float().numpy()
    return found
