"""LowRank: one module's change of weight, kept as two thin factors, and the algebra on it.

`delta = scale * up @ down` maps the module's input to its output. Nothing here ever forms that matrix except `dense`,
so every operation costs O((out + in) * rank^2) where the dense one costs O(out * in * min(out, in)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import BadOption, IncompatibleAdapters


@dataclass(frozen=True)
class Shape:
    """What is known of a module without reading a tensor.

    `inputs` counts the flattened input: channels x kernel for a convolution, the vocabulary for an embedding.
    """

    rank: int
    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()
    embedding: bool = False

    @property
    def parameters(self) -> int:
        return self.rank * (self.outputs + self.inputs)

    def fits(self, other: Shape) -> bool:
        """Whether deltas of these shapes can be added; a 1x1 convolution is a linear map."""
        return (self.outputs, self.inputs, _spatial(self.kernel), self.embedding) == (
            other.outputs,
            other.inputs,
            _spatial(other.kernel),
            other.embedding,
        )

    def __str__(self) -> str:
        kind = "embedding " if self.embedding else ""
        kernel = f" kernel {'x'.join(map(str, self.kernel))}" if self.kernel else ""
        return f"{kind}{self.outputs}x{self.inputs}{kernel}"


@dataclass(frozen=True, eq=False)
class LowRank:
    """A delta of rank at most `rank`.

    down: (rank, inputs); up: (outputs, rank); `scale` multiplies their product. For a convolution `inputs` is
    in_channels / groups x kernel, and `kernel` remembers the spatial shape; for an embedding it is the vocabulary.
    Factors may be of any floating dtype; arithmetic is done in float32, or in float64 where a factor is float64.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    kernel: tuple[int, ...] = ()
    embedding: bool = False

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.down.shape[0] != self.up.shape[1]:
            raise IncompatibleAdapters(
                f"factors of shapes {tuple(self.up.shape)} and {tuple(self.down.shape)} do not multiply: "
                "expected (outputs, rank) and (rank, inputs)"
            )

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> Shape:
        return Shape(self.rank, self.up.shape[0], self.down.shape[1], self.kernel, self.embedding)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.up.dtype, self.down.dtype)

    def wide(self) -> LowRank:
        """The same delta with factors in the dtype that arithmetic uses."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return replace(self, down=self.down.to(dtype), up=self.up.to(dtype))

    def dense(self) -> Tensor:
        """The delta itself: (outputs, inputs), or (outputs, in_channels, *kernel) for a convolution."""
        wide = self.wide()
        delta = wide.scale * (wide.up @ wide.down)
        return delta.reshape(delta.shape[0], -1, *self.kernel) if self.kernel else delta

    def scaled(self, weight: float) -> LowRank:
        """weight * delta; only the scalar changes."""
        return replace(self, scale=self.scale * weight)

    def folded(self) -> LowRank:
        """The same delta with scale 1: sqrt(|scale|) in each factor (float16 range), the sign in `up`."""
        if self.scale == 1.0:
            return self
        root = math.sqrt(abs(self.scale))
        wide = self.wide()
        return replace(wide, down=wide.down * root, up=wide.up * math.copysign(root, self.scale), scale=1.0)

    def to(self, dtype: torch.dtype) -> LowRank:
        """Factors cast to `dtype`."""
        return replace(self, down=self.down.to(dtype), up=self.up.to(dtype))

    def inner(self, other: LowRank) -> float:
        """Frobenius inner product of two deltas: tr((up^T up') (down' down^T)), summed in float64."""
        self._check_fits(other)
        left = self.up.double().T @ other.up.double()
        right = self.down.double() @ other.down.double().T
        return self.scale * other.scale * float((left * right).sum())

    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return math.sqrt(max(self.inner(self), 0.0))

    def cosine(self, other: LowRank) -> float:
        """Cosine between two deltas; 0 where either is zero."""
        product = self.norm() * other.norm()
        return self.inner(other) / product if product else 0.0

    def svd(self, rank: int | None = None, *, energy: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD of the delta: (outputs, k), (k,), (k, inputs); k = min(rank, outputs, inputs), or fewer on demand.

        QR of both factors and an SVD of the small core: Eckart and Young's optimum at rank-space cost. Signs are fixed
        (the largest entry of each left vector is positive), so equal deltas give equal factors. `rank` and `energy`
        bound k as in `truncate`; vectors that are cut off are never made.
        """
        wide = self.wide()
        left, right = _Triangle.of(wide.up), _Triangle.of(wide.down.T)
        u, values, vh = torch.linalg.svd(left.core @ right.core.T * wide.scale, full_matrices=False)
        keep = min(rank or len(values), len(values))
        if energy is not None:
            keep = min(keep, rank_for(values, energy))
        u, v = left.lift(u[:, :keep]), right.lift(vh[:keep].T)
        peaks = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).squeeze(0)
        signs = torch.where(peaks < 0, -1.0, 1.0).to(u.dtype)
        return u * signs, values[:keep], v.T * signs[:, None]

    def truncate(self, rank: int | None = None, *, energy: float | None = None) -> LowRank:
        """The nearest delta of at most `rank`, or of the least rank that keeps the share `energy` of the squared norm.

        The result is in the canonical gauge (balanced square roots of the singular values on both sides, signs fixed,
        scale 1). A rank above the present one changes the gauge only. Raises BadOption for values outside their range.
        """
        check_limits(rank, energy)
        u, values, vh = self.svd(rank, energy=energy)
        roots = values.sqrt()
        return replace(self, up=u * roots, down=roots[:, None] * vh, scale=1.0)

    def sketch(self, rank: int, *, oversample: int = 16, iterations: int = 4, seed: int = 0) -> LowRank:
        """Nearly `truncate(rank)`, by a randomised SVD (Halko, Martinsson and Tropp 2011), in the same gauge.

        For factors too wide to decompose: O((out + in) * own rank * (rank + oversample)) a pass, no QR of a factor.
        Subspace iteration on rank + `oversample` random directions; what is lost beyond the optimum falls with both.
        Raises BadOption for numbers outside their range.
        """
        check_limits(rank, None)
        if oversample < 0 or iterations < 0:
            raise BadOption(f"oversample is {oversample}, iterations {iterations}; expected numbers of at least 0")
        wide = self.wide()
        width = min(rank + oversample, wide.up.shape[0], wide.down.shape[1])
        chance = torch.Generator().manual_seed(seed)
        start = torch.randn(wide.down.shape[1], width, generator=chance, dtype=torch.float64)
        basis = start.to(wide.down)
        for _ in range(iterations + 1):
            image = torch.linalg.qr(wide.up @ (wide.down @ basis)).Q
            basis = torch.linalg.qr(wide.down.T @ (wide.up.T @ image)).Q
        projected = wide.up @ (wide.down @ basis)
        return replace(wide, down=basis.T, up=projected).truncate(rank)

    def _check_fits(self, other: LowRank) -> None:
        if not self.shape.fits(other.shape):
            raise IncompatibleAdapters(f"deltas of shapes {self.shape} and {other.shape} do not match")


@dataclass(frozen=True, eq=False)
class _Triangle:
    """A QR factorisation whose orthogonal factor stays a product of reflections: half the work where few of its
    columns are wanted. core: (min(rows, columns), columns)."""

    reflections: Tensor
    scales: Tensor
    core: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> _Triangle:
        packed, scales = torch.geqrf(matrix)
        size = min(matrix.shape)
        return cls(packed[:, :size], scales, packed[:size].triu())

    def lift(self, vectors: Tensor) -> Tensor:
        """The orthogonal factor times (size, k) vectors: (rows, k)."""
        padded = vectors.new_zeros(self.reflections.shape[0], vectors.shape[1])
        padded[: vectors.shape[0]] = vectors
        return torch.ormqr(self.reflections, self.scales, padded)


def check_limits(rank: int | None, energy: float | None) -> None:
    """Raise BadOption for a rank below 1 or a share of energy that is not above 0 and at most 1."""
    if rank is not None and rank < 1:
        raise BadOption(f"rank is {rank}; expected a whole number of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise BadOption(f"energy is {energy}; expected a share above 0 and at most 1")


def concat(parts: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """The weighted sum of deltas, exactly: factors stacked along the rank, each weight and scale shared evenly.

    The result has scale 1 and the sum of the ranks. Raises IncompatibleAdapters where shapes differ.
    """
    weights = [1.0] * len(parts) if weights is None else list(weights)
    if not parts or len(weights) != len(parts):
        raise BadOption(f"{len(weights)} weights for {len(parts)} deltas; expected one for each, and at least one")
    for part in parts[1:]:
        parts[0]._check_fits(part)
    folded = [part.scaled(weight).folded().wide() for part, weight in zip(parts, weights, strict=True)]
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in folded) else torch.float32
    return replace(
        folded[0],
        down=torch.cat([part.down.to(dtype) for part in folded]),
        up=torch.cat([part.up.to(dtype) for part in folded], dim=1),
        kernel=max((part.kernel for part in parts), key=len),
    )


def rank_for(values: Tensor, energy: float) -> int:
    """How many of the descending singular values it takes for the share `energy` of their sum of squares."""
    kept = torch.cumsum(values.double() ** 2, dim=0)
    if not float(kept[-1]):
        return 1
    reached = int((kept < energy * kept[-1] * (1 - 1e-12)).sum())
    return min(reached + 1, len(values))


def _spatial(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return () if all(size == 1 for size in kernel) else kernel
