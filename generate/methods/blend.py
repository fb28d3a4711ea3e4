"""A softmax-weighted blend of the nearest experts, summed exactly in delta space."""

from __future__ import annotations

from dataclasses import dataclass

from ...hub.adapter import Adapter
from ...hub.errors import BadOption, GenerationError
from ...hub.lowrank import LowRank, concat
from ..library import Library, Vectors, ranked, share
from ..run import Generated, Generator, Share


@dataclass(frozen=True)
class _Blend:
    library: Library
    neighbours: int
    temperature: float
    rank: int | None

    def sample(self, query: Vectors, *, seed: int) -> Generated:
        near = ranked(self.library, query, self.neighbours)
        weights = share([cosine for _, cosine in near], self.temperature)
        experts = [self.library.experts[index] for index, _ in near]
        loaded = [expert.load() for expert in experts]
        blended = Adapter(
            modules=_weighted_sum(loaded, weights, self.rank),
            base=self.library.base,
            meta={"config": loaded[0].meta.get("config"), "name": "blend"},
        )
        shares = tuple(
            Share(expert.id, expert.name, cosine, weight)
            for expert, (_, cosine), weight in zip(experts, near, weights, strict=True)
        )
        return Generated(blended, shares, novelty=1.0 - max(blended.cosine(one) for one in loaded))


def blend(
    library: Library,
    *,
    neighbours: int = 4,
    temperature: float = 0.2,
    rank: int | None = None,
) -> Generator:
    """sum_k softmax(similarity_k / temperature) delta_k over the nearest experts: SG-LoRA's prior mean in delta space.

    neighbours: experts taken. temperature: small follows the nearest, large averages. rank: of the result; None keeps
    the sum exact.
    """
    if neighbours < 1 or temperature <= 0:
        raise BadOption(f"neighbours is {neighbours}, temperature {temperature}; expected at least 1 and above 0")
    return _Blend(library, neighbours, temperature, rank)


def _weighted_sum(experts: list[Adapter], weights: list[float], rank: int | None) -> dict[str, LowRank]:
    names = sorted({name for expert in experts for name in expert.shapes})
    modules = {}
    for name in names:
        holders = [(e.modules[name], w) for e, w in zip(experts, weights, strict=True) if name in e.modules]
        shapes = {str(module.shape) for module, _ in holders}
        if len(shapes) > 1:
            raise GenerationError(
                f"experts disagree on {name}: {' and '.join(sorted(shapes))}; they fit different bases"
            )
        total = concat([module for module, _ in holders], [weight for _, weight in holders])
        modules[name] = total if rank is None else total.truncate(rank)
    return modules
