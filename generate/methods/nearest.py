"""The nearest expert as it is: the baseline that every generator has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from ..library import CLOSE, Library, Vectors, ranked
from ..run import Generated, Generator, Share


@dataclass(frozen=True)
class _Nearest:
    library: Library
    least: float

    def sample(self, query: Vectors, *, seed: int) -> Generated:
        [(index, cosine)] = ranked(self.library, query, 1, self.least)
        expert = self.library.experts[index]
        return Generated(expert.load(), (Share(expert.id, expert.name, cosine, 1.0),), novelty=0.0)


def nearest(library: Library, *, min_similarity: float = CLOSE) -> Generator:
    """The expert whose description is most similar.

    min_similarity: cosine below which the generator refuses.
    """
    return _Nearest(library, min_similarity)
