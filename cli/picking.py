"""Which adapters a picture is painted with: those that the user names, or those that the prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..hub.bases import same_base
from ..hub.errors import IncompatibleAdapters, LoraHubError
from .refs import Named, find, load, weights_of

if TYPE_CHECKING:
    from ..generate.choosing import Spared
    from ..generate.painting import Painter
    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from ..index.encoders.text import TextEncoder
    from ..index.weight_encoder import WeightEncoder

STYLE = "style"  # the tag


@dataclass(frozen=True)
class Picked:
    """An adapter to paint with. `score` and `why` are of retrieval; None and empty where the user named it."""

    named: Named
    adapter: Adapter
    weight: float
    score: float | None = None
    why: tuple[str, ...] = ()

    @property
    def style(self) -> bool:
        """Whether it is tagged as a style."""
        entry = self.named.entry
        return entry is not None and STYLE in (tag.casefold() for tag in entry.tags)


def named_adapters(
    catalog: Catalog, painter: Painter, refs: Sequence[str], weights: Sequence[float], *, allow_pickle: bool = False
) -> list[Picked]:
    """The adapters that the user named. Raises IncompatibleAdapters for one that does not fit the painter's base."""
    from ..generate.painting import addressed, checked

    names, shares = weights_of(refs, weights)
    found = [find(catalog, ref) for ref in names]
    adapters = [addressed(painter, load(one, allow_pickle=allow_pickle)) for one in found]
    for adapter in adapters:
        foreign = _other_base(adapter.base, painter)
        if foreign:
            raise IncompatibleAdapters(f"{adapter.name}: {foreign}; say --base {adapter.base} if they are the same")
    checked(painter, adapters)
    return [Picked(*one) for one in zip(found, adapters, shares, strict=True)]


def found_adapters(
    catalog: Catalog, painter: Painter, prompt: str, weights: Sequence[float], *, limit: int, mode: str, quiet: bool
) -> tuple[list[Picked], list[Spared]]:
    """The adapters that the prompt asks for and that fit the painter's base, and what came up besides."""
    from ..generate.choosing import choose
    from ..generate.painting import addressed, misfit
    from .find import encoded

    opened: dict[str, tuple[Named, Adapter]] = {}

    def refusal(entry: Entry) -> str | None:
        if not entry.mergeable:
            return entry.reason
        foreign = _other_base(entry.base, painter)
        if foreign:
            return foreign
        try:
            named = find(catalog, entry.id)
            opened[entry.id] = named, addressed(painter, load(named))
        except LoraHubError as error:
            return str(error)
        return misfit(painter, opened[entry.id][1])

    encoder = _reader(catalog, mode, quiet=quiet) if limit else None
    encoders = (
        encoded(catalog, encoder.space, unknown=mode == "weights", quiet=quiet) if encoder and mode != "meaning" else []
    )
    chosen, spared = choose(
        catalog, prompt, refusal, limit=limit, mode=mode, encoder=encoder, encoders=_of(encoders, painter)
    )
    _, shares = weights_of([one.entry.id for one in chosen], weights if chosen else ())
    picked = [
        Picked(*opened[one.entry.id], share, one.score, one.why) for one, share in zip(chosen, shares, strict=True)
    ]
    return picked, spared


def _of(encoders: Sequence[WeightEncoder], painter: Painter) -> list[WeightEncoder]:
    """Those that can read adapters for the painter's base."""
    return [one for one in encoders if same_base(one.base, painter.base)]


def _other_base(base: str | None, painter: Painter) -> str | None:
    """What is wrong with an adapter for this base, by name; shapes are looked at elsewhere."""
    if same_base(base, painter.base):
        return None
    return f"it is for {base}, and the pipeline is {painter.base} ({painter.base_from})"


def _reader(catalog: Catalog, mode: str, *, quiet: bool) -> TextEncoder | None:
    """The encoder that retrieval by meaning or weights needs, once all descriptions are embedded."""
    from ..index.embed import fill
    from ..index.encoders.text import text
    from . import show

    if mode not in ("hybrid", "meaning", "weights"):
        return None
    encoder = text()
    if mode == "weights":
        return encoder
    with show.progress("reading descriptions", quiet=quiet) as advance:
        fill(catalog, encoder, progress=advance)
    return encoder
