"""Generation: one call for every method, and the shape that every generator has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..hub import plugins
from ..hub.errors import BadOption
from .library import Library, Vectors

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..index.encoders.text import TextEncoder

METHODS = f"{__package__}.methods"


@dataclass(frozen=True)
class Share:
    """An expert's part in a generated adapter: its cosine with the description, and its weight."""

    id: str
    name: str
    similarity: float
    weight: float


@dataclass(frozen=True)
class Generated:
    """A new adapter, the experts behind it, and its novelty.

    novelty: 1 - cosine between the new delta and that of its nearest expert; 0 is a copy.
    """

    adapter: Adapter
    experts: tuple[Share, ...]
    novelty: float


class Generator(Protocol):
    """What a method learns from a library: frozen, and asked as often as wanted."""

    def sample(self, query: Vectors, *, seed: int) -> Generated:
        """An adapter for a description's unit vector (dim,); equal seeds give equal adapters."""
        ...


def methods() -> list[str]:
    """The generators there are."""
    return plugins.names(METHODS)


def generate(
    library: Library,
    description: str,
    encoder: TextEncoder,
    *,
    method: str = "blend",
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
) -> Generated:
    """Make an adapter for a task from its description and the experts of a library.

    given: the method's options. Raises GenerationError where nothing in the library is close, UnknownMethod, BadOption.
    """
    if not description.strip():
        raise BadOption("the description is empty; say what the adapter is to do")
    function = plugins.load(METHODS, method)
    chosen = plugins.check_options(function, dict(given or {}))
    generator: Generator = function(library, **chosen)
    return generator.sample(encoder.encode([description])[0], seed=seed)
