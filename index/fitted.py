"""The weight encoders of a catalogue: which there are, what they are fitted to, and their vectors kept up to date."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from ..hub.bases import family, same_base
from ..hub.entries import words
from ..hub.errors import BadOption, FormatError, RetrievalError
from .vector_index import forget_index
from .weight_encoder import SUFFIX, encoder_for, encoder_path, shipped_encoders

if TYPE_CHECKING:
    from pathlib import Path

    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from .weight_encoder import WeightEncoder

ENOUGH = 8  # described adapters of a base without which nothing can be fitted and checked
DULL = 0.5  # share of a base's adapters above which a tag tells none from another
PREFIX = "weights:"

log = logging.getLogger(__name__)

# words of file names that say nothing of what an adapter does
_EMPTY = set(
    "adapter model lora locon lokr loha dora checkpoint pytorch weights final step steps epoch epochs last best test "
    "new my the and for with version ver fp16 fp32 bf16 rank alpha safetensors diffusers peft kohya output out run "
    "file tmp untitled".split()
)


@dataclass(frozen=True)
class Described:
    """An adapter that something is said of, and what: one text an aspect, each searched for on its own."""

    entry: Entry
    texts: tuple[str, ...]


def encoders(catalog: Catalog, texts: str | None = None, *, unknown: bool = True) -> list[WeightEncoder]:
    """The encoders that can read some of the catalogue's adapters, one a base: the user's own before those shipped.

    texts: only those into this text encoder's space. unknown: whether an adapter of unknown base may be for any.
    """
    bases = [base for base in catalog.bases() if unknown or base is not None]
    fitting = [name for name in _names(catalog.home) if any(same_base(name, base) for base in bases)]
    return [one for one in _read(catalog.home, fitting) if texts in (None, one.texts)]


def every_encoder(home: Path) -> Iterator[WeightEncoder]:
    """The encoders that there are, one a base; each is read when it is asked for."""
    return _read(home, _names(home))


def forget_stale(catalog: Catalog) -> list[str]:
    """Remove the vectors, and the index, of weight encoders that are no longer used; returns their spaces."""
    used = {one.space for one in every_encoder(catalog.home)}
    stale = [space for space in catalog.vector_spaces() if space.startswith(PREFIX) and space not in used]
    for space in stale:
        catalog.drop_vectors(space)
        forget_index(catalog.home, space)
    return stale


def described(catalog: Catalog, base: str | None = None) -> tuple[str, list[Described]]:
    """The base, and its mergeable adapters that say something of themselves, by id.

    base: None for the only one that has enough of them. Raises BadOption where several have, RetrievalError where none
    has, or the given one has too few.
    """
    entries: dict[str, list[Entry]] = {}
    for entry in catalog.entries(base=base):
        if entry.mergeable and entry.base is not None:
            entries.setdefault(family(entry.base), []).append(entry)
    shelves = {name: shelf for name, some in entries.items() if (shelf := _described(some))}
    enough = {name: shelf for name, shelf in shelves.items() if len(shelf) >= ENOUGH}
    if len(enough) > 1:
        listed = ", ".join(sorted(str(shelf[0].entry.base) for shelf in enough.values()))
        raise BadOption(f"several bases have enough described adapters: say --base, one of {listed}")
    if not enough:
        counts = ", ".join(f"{shelf[0].entry.base}: {len(shelf)}" for shelf in shelves.values())
        raise RetrievalError(
            f"a weight encoder needs at least {ENOUGH} described adapters of one base{f' ({base})' if base else ''}; "
            f"the catalogue has {counts or 'none'}: add, describe or tag more"
        )
    [shelf] = enough.values()
    return base or str(shelf[0].entry.base), sorted(shelf, key=lambda one: one.entry.id)


def said(entry: Entry, dull: Collection[str] = ()) -> tuple[str, ...]:
    """What is said of an adapter, one text an aspect: title or telling name, description, trigger words, tags.

    dull: tags that tell nothing, because most have them.
    """
    tags = [tag for tag in entry.tags if tag not in dull]
    title = entry.title or telling_name(entry.name)
    tidy = (
        " ".join(part.split()).rstrip(" .")
        for part in (title, entry.description, ", ".join(entry.triggers), ", ".join(tags))
    )
    return tuple({part.casefold(): part for part in tidy if part}.values())


def _described(entries: Sequence[Entry]) -> list[Described]:
    counts = Counter(tag for entry in entries for tag in entry.tags)
    dull = {tag for tag, count in counts.items() if count > DULL * len(entries)}
    return [Described(entry, told) for entry in entries if (told := said(entry, dull))]


def telling_name(name: str) -> str:
    """The words of a name that may say what an adapter does; "" where there are none: "lora_v2-fp16" says nothing."""
    kept = [
        word for word in words(name).split() if re.fullmatch(r"[^\W\d_]{3,}", word) and word.casefold() not in _EMPTY
    ]
    return " ".join(kept)


def _read(home: Path, names: Iterable[str]) -> Iterator[WeightEncoder]:
    """The encoders by those names; a damaged one is named in a warning: the rest, and all words, can still be used."""
    for name in names:
        try:
            found = encoder_for(home, name)
        except FormatError as error:
            log.warning("%s", error)
            continue
        if found is not None:
            yield found


def _names(home: Path) -> list[str]:
    """The bases that have an encoder, one name a family."""
    folder = encoder_path(home, "any").parent
    own = [unquote(path.name.removesuffix(SUFFIX)) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    return list({family(name): name for name in reversed([*own, *shipped_encoders()])}.values())
