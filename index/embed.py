"""Fills the vectors that the catalogue lacks, in a space of words or of weights.

Every batch is stored as soon as it is made: a run that is killed has lost one batch, and the next one carries on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..hub.errors import LoraHubError

if TYPE_CHECKING:
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from .encoders.text import TextEncoder

BATCH = 256  # texts, or adapters, between two writes
WEIGHT_SPACES = ("delta", "columns")

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
    for batch in _chunks(iter(texts)):
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


def _sketches(catalog: Catalog, entry: Entry, spaces: list[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    from ..hub.plugins import load

    package = f"{__package__}.encoders"
    try:
        adapter = catalog.read(entry)
        for space in spaces:
            yield space, load(package, space)(adapter).numpy()
    except LoraHubError as error:
        log.warning("%s is left out of the weight index: %s", entry.name, error)


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, BATCH)):
        yield batch
