"""Fills the vectors that the catalogue lacks, in a space of words or of weights.

Every batch is stored as soon as it is made: a run that is killed has lost one batch, and the next one carries on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..hub.errors import IncompatibleAdapters, LoraHubError

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from .encoders.text import TextEncoder
    from .weight_encoder import WeightEncoder

BATCH = 256  # texts between two writes
ENCODED = 32  # adapters encoded between two writes
WEIGHT_SPACES = ("delta", "columns")
TOLD = 3  # reasons that a warning gives

Item = TypeVar("Item")

Progress = Callable[[int, int], None]
"""Called with (done, total) after every batch."""

log = logging.getLogger(__name__)


def fill(catalog: Catalog, encoder: TextEncoder, *, progress: Progress | None = None) -> int:
    """Embed what the catalogue's words lack in `encoder.space`; returns how many vectors were stored.

    Equal texts are embedded once. Nothing is loaded or computed where nothing is missing.
    """
    missing = catalog.missing_vectors(encoder.space)
    owners: dict[str, list[Entry]] = {}
    for entry in missing:
        owners.setdefault(entry.text(), []).append(entry)
    texts = sorted(owners, key=len)  # texts of one length waste no padding
    done = 0
    for batch in _chunks(iter(texts), BATCH):
        rows = [
            (entry.id, entry.text_digest, vector)
            for text, vector in zip(batch, encoder.encode(batch), strict=True)
            for entry in owners[text]
        ]
        catalog.store_vectors(encoder.space, rows)
        done += len(rows)
        if progress:
            progress(done, len(missing))
    return done


def fill_weights(catalog: Catalog, *, among: Collection[str] | None = None, progress: Progress | None = None) -> int:
    """Sketch the weights of the mergeable adapters that lack a vector in a weight space; returns how many were read.

    `among`: the ids to look at, None for all. An adapter that cannot be read now (its file is gone) is named in a
    warning and stays missing.
    """
    wanted: dict[str, list[str]] = {}
    entries: dict[str, Entry] = {}
    for space in WEIGHT_SPACES:
        for entry in catalog.missing_vectors(space):
            if entry.mergeable and (among is None or entry.id in among):
                wanted.setdefault(entry.id, []).append(space)
                entries[entry.id] = entry
    done = 0
    for id_, spaces in wanted.items():
        for space, vector in _sketches(catalog, entries[id_], spaces):
            catalog.store_vectors(space, [(id_, entries[id_].digest, vector)])
        done += 1
        if progress:
            progress(done, len(wanted))
    return done


def fill_encoded(
    catalog: Catalog,
    encoder: WeightEncoder,
    *,
    among: Collection[str] | None = None,
    unknown: bool = True,
    progress: Progress | None = None,
) -> int:
    """Encode the mergeable adapters of the encoder's base, or of an unknown one, that lack a vector in its space.

    among: the ids to look at, None for all. unknown: whether adapters of unknown base are tried; to find out that they
    do not fit, their files are read. Returns how many vectors were stored. What the encoder refuses gets a
    vector of zeros, so that it is not tried again; what cannot be read now stays missing. A warning names both. Torch
    is not loaded where there is nothing to read.
    """
    lacking = catalog.missing_vectors(encoder.space, for_base=encoder.base)
    lacking = [one for one in lacking if one.mergeable and (among is None or one.id in among)]
    lacking = [one for one in lacking if unknown or one.base is not None]
    failures: list[str] = []
    done = stored = 0
    for batch in _chunks(iter(lacking), ENCODED):
        rows = _encoded(catalog, encoder, batch, failures)
        catalog.store_vectors(encoder.space, rows)
        done, stored = done + len(batch), stored + len(rows)
        if progress:
            progress(done, len(lacking))
    if failures:
        more = f"; and {len(failures) - TOLD} more" if len(failures) > TOLD else ""
        log.warning("not to be found by their weights: %s%s", "; ".join(failures[:TOLD]), more)
    return stored


def _encoded(
    catalog: Catalog, encoder: WeightEncoder, batch: list[Entry], failures: list[str]
) -> list[tuple[str, str, NDArray[np.float32]]]:
    """Rows to store for those of a batch that can be read."""
    vectors: dict[str, NDArray[np.float32]] = {}
    readable: dict[str, Adapter] = {}
    for entry in batch:
        try:
            adapter = catalog.read(entry)
            adapter = replace(adapter, base=entry.base, meta={**adapter.meta, "name": entry.name})
            encoder.manifest.check(adapter)
            readable[entry.id] = adapter
        except IncompatibleAdapters as error:
            vectors[entry.id] = np.zeros(encoder.dim, np.float32)
            if entry.base is not None:  # an unknown base was only tried
                failures.append(str(error))
        except LoraHubError as error:
            failures.append(str(error))
    try:
        vectors |= dict(zip(readable, encoder.encode_all(readable.values()), strict=True)) if readable else {}
    except LoraHubError:  # one of them holds what cannot be read: each by itself
        for id_, adapter in readable.items():
            try:
                vectors[id_] = encoder.encode(adapter)
            except LoraHubError as error:
                failures.append(str(error))
    return [(entry.id, entry.digest, vectors[entry.id]) for entry in batch if entry.id in vectors]


def _sketches(catalog: Catalog, entry: Entry, spaces: list[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    from ..hub.plugins import load

    package = f"{__package__}.encoders"
    try:
        adapter = catalog.read(entry)
        for space in spaces:
            yield space, load(package, space)(adapter).numpy()
    except LoraHubError as error:
        log.warning("%s is left out of the weight index: %s", entry.name, error)


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(islice(items, size)):
        yield batch
