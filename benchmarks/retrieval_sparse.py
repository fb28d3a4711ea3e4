"""Sparse metadata: what lorahub's own hybrid search still finds when adapters lose their words, and how much of that is
the weights' voice.

The adapters that no encoder learned from lie in a catalogue with a name, tags and a description. Then a growing part of
them loses all three, the same ones with and without the encoder.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lorahub.hub.catalog import Catalog
from lorahub.hub.entries import Entry
from lorahub.index.embed import fill, fill_encoded
from lorahub.index.search import search
from lorahub.index.weight_encoder import WeightEncoder
from retrieval_metrics import DEPTHS, summary
from retrieval_splits import HELD_BACK
from retrieval_tables import Asked

GONE = (0.0, 0.5, 0.9, 1.0)
LIMIT = max(DEPTHS)


def sparse(asked: Asked, encoder: WeightEncoder, base: str, seed: int, most: int | None = None) -> list[dict[str, Any]]:
    """A line for every share of adapters without words: figures with the encoder's voice and without it.

    What is not among the first ten counts as not found, in MRR too. most: about how many queries, None for all.
    """
    rows = asked.gallery("new", "")
    questions = [query for part in HELD_BACK for query in asked.queries[part]]
    questions = questions[:: max(1, len(questions) // (most or len(questions)))]
    with tempfile.TemporaryDirectory() as scratch, Catalog(Path(scratch) / "home") as catalog:
        library = Library(catalog, asked, rows.tolist(), base)
        fill_encoded(catalog, encoder)
        order = random.Random(f"sparse {seed}").sample(library.entries, len(library.entries))
        lines = []
        for gone in GONE:
            library.silence(order[: round(gone * len(order))])
            line = {"with weights": library.found(questions, [encoder]), "without": library.found(questions, [])}
            lines.append({"gone": gone, **line})
    return lines


class Library:
    """A catalogue of some of the pool's adapters, each with its words."""

    def __init__(self, catalog: Catalog, asked: Asked, rows: Sequence[int], base: str) -> None:
        self.catalog, self.words, self.base = catalog, asked.bench.words, base
        self.concept: dict[str, str] = {}
        self.silent: set[str] = set()
        folders = {str(asked.bench.pool.folders[row].resolve()): row for row in rows}
        for outcome in catalog.add([Path(folder) for folder in folders], base=base):
            if outcome.status != "added" or outcome.id is None:
                raise RuntimeError(
                    f"{outcome.path}: {outcome.status} {outcome.reason or ''}; expected every adapter once"
                )
            row = folders[outcome.path]
            concept, number = asked.bench.pool.names()[row], asked.bench.pool.copies[row].number
            self.concept[outcome.id] = concept
            catalog.rename(outcome.id, f"{concept} {number}".replace(" ", "-"))
            catalog.describe(outcome.id, asked.bench.said[row])
            catalog.tag(outcome.id, [asked.bench.concepts[concept].kind])
        self.entries: list[Entry] = catalog.entries()

    def silence(self, entries: Sequence[Entry]) -> None:
        """Takes name, tags and description from these."""
        for number, entry in enumerate(entries):
            if entry.id not in self.silent:
                self.catalog.rename(entry.id, f"{number:05d}")
                self.catalog.describe(entry.id, "")
                self.catalog.tag(entry.id, [], remove=entry.tags)
                self.silent.add(entry.id)
        fill(self.catalog, self.words)

    def found(self, questions: Sequence[tuple[str, str]], encoders: Sequence[WeightEncoder]) -> dict[str, float]:
        """recall@k and MRR of hybrid search, with these encoders' voices."""
        places = []
        for wording, concept in questions:
            hits = search(self.catalog, wording, base=self.base, limit=LIMIT, encoder=self.words, encoders=encoders)
            right = [self.concept[hit.entry.id] == concept for hit in hits]
            places.append(right.index(True) + 1 if any(right) else LIMIT + 1)
        figures = summary(np.array(places))
        reached = [1 / place for place in places if place <= LIMIT]
        return figures | {"mrr": float(sum(reached) / len(places))}
