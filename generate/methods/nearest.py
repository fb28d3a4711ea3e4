"""The nearest expert as it is: the baseline that every generator has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from ..library import Library, Vectors, ranked
from ..run import Generated, Generator, Share


@dataclass(frozen=True)
class _Nearest:
    library: Library

    def sample(self, query: Vectors, *, seed: int) -> Generated:
        [(index, cosine)] = ranked(self.library, query, 1)
        expert = self.library.experts[index]
        return Generated(expert.load(), (Share(expert.id, expert.name, cosine, 1.0),), novelty=0.0)


def nearest(library: Library) -> Generator:
    """The expert whose description is most similar."""
    return _Nearest(library)
