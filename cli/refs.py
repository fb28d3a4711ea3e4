"""How the command line names adapters: by catalogue name, the beginning of an id, or path; with or without a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..hub.errors import BadOption, CatalogError

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry


@dataclass(frozen=True)
class Named:
    """An adapter that the user named: where it lies and, if the catalogue knows it, its entry."""

    ref: str
    path: Path
    entry: Entry | None

    @property
    def name(self) -> str:
        if self.entry:
            return self.entry.name
        from ..hub.naming import name_from_path

        return name_from_path(str(self.path.resolve()), folder=self.path.is_dir())

    @property
    def description(self) -> str:
        """What the catalogue says it does."""
        return self.entry.description if self.entry else ""

    def digest(self, *, allow_pickle: bool = False) -> str:
        """The hash of the adapter's content."""
        from ..hub.reading import fingerprint

        return self.entry.digest if self.entry else fingerprint(self.path, allow_pickle=allow_pickle)


def weighted(ref: str) -> tuple[str, float | None]:
    """Split `name:0.7`, `name@0.7` or `<lora:name:0.7>` into reference and weight (None: not given).

    A path that exists is never split. Raises BadOption for a weight that is not finite.
    """
    if Path(ref).exists():
        return ref, None
    tag = re.fullmatch(r"<lora:(.+?)(?::([^:>]+))?>", ref)
    parts = (tag[1], tag[2]) if tag else _cut(ref)
    if parts[1] is None:
        return parts[0], None
    try:
        weight = float(parts[1])
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise BadOption(f"the weight in {ref!r} is {parts[1]!r}; expected a number such as 0.7 or -0.5")
    return parts[0], weight


def _cut(ref: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"(.+)[:@]([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|[-+]?inf)", ref)
    return (found[1], found[2]) if found else (ref, None)


def find(catalog: Catalog, ref: str) -> Named:
    """The adapter that `ref` names. Raises UnknownAdapter, saying what comes close."""
    try:
        entry = catalog.entry(ref)
        return Named(ref, catalog.path(entry), entry)
    except CatalogError:  # unknown, or no longer what was added: a path that exists speaks for itself
        if not Path(ref).exists():
            raise
        return Named(ref, Path(ref), None)


def load(named: Named, *, allow_pickle: bool = False, alpha: float | None = None) -> Adapter:
    """Read the adapter under the name and base that the catalogue has for it."""
    from dataclasses import replace

    from ..hub.reading import read

    # what the catalogue knows was read with consent when it was added
    adapter = read(named.path, allow_pickle=allow_pickle or named.entry is not None, alpha=alpha)
    base = named.entry.base if named.entry and named.entry.base else adapter.base
    return replace(adapter, base=base, meta={**adapter.meta, "name": named.name})


def weights_of(refs: Sequence[str], weights: Sequence[float]) -> tuple[list[str], list[float]]:
    """References and their weights: written behind each, or with -w for each or once for all; default 1.

    Raises BadOption if both.
    """
    split = [weighted(ref) for ref in refs]
    inline = [weight for _, weight in split]
    if weights and any(weight is not None for weight in inline):
        raise BadOption("weights are given both as REF:weight and with -w; use one of the two")
    if len(weights) not in (0, 1, len(refs)):
        raise BadOption(
            f"{len(weights)} weights (-w) for {len(refs)} adapters; give one for each, one for all, or none"
        )
    chosen = (
        list(weights) * (len(refs) // len(weights))
        if weights
        else [1.0 if weight is None else weight for weight in inline]
    )
    return [ref for ref, _ in split], chosen


def any_weight(refs: Sequence[str]) -> bool:
    """Whether a weight is written behind any of the references."""
    return any(weighted(ref)[1] is not None for ref in refs)
