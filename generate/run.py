"""Generation: one call for every method, and the shape that every generator has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ..hub import plugins
from ..hub.errors import BadOption
from .library import Library, Vectors, far, nearest_expert, reread

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

    novelty: 1 - cosine between the new delta and that of its nearest expert; 0 is a copy. similarity: of the request's
    words to the nearest description, -1 to 1; forced: whether it is made although that is too far.
    """

    adapter: Adapter
    experts: tuple[Share, ...]
    novelty: float
    similarity: float = math.nan
    forced: bool = False


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
    ranker: TextEncoder | None = None,
    learned: tuple[Generator, TextEncoder] | None = None,
    force: bool = False,
) -> Generated:
    """Make an adapter for a task from its description and the experts of a library.

    encoder: that of the library's vectors, by which a request is near or far. given: the method's options. ranker: the
    encoder by which the method ranks experts instead, see `index.transfer`. learned: a fitted generator, which takes
    the method's place, and the encoder that it was fitted to. force: serve a request that is far from everything, too.
    Raises Abstained, UnknownMethod, BadOption.
    """
    if not description.strip():
        raise BadOption("the description is empty; say what the adapter is to do")
    query = encoder.encode([description])[0]
    refusal = far(library, query)
    if refusal and not force:
        raise refusal
    if learned:
        generator, words = learned
        if given:
            raise BadOption(f"a fitted generator has no option {next(iter(given))!r}; it has those of its fit")
    else:
        words = ranker or encoder
        function = plugins.load(METHODS, method)
        generator = function(reread(library, ranker), **plugins.check_options(function, dict(given or {})))
    made = generator.sample(query if words is encoder else words.encode([description])[0], seed=seed)
    return replace(made, similarity=nearest_expert(library, query)[1], forced=refusal is not None)
