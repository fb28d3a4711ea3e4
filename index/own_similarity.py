"""The similarity that is learned from a catalogue's measured transfer: fitted, kept in the home folder, put to use.

It is used where its validation says that it chooses better than the plain cosine of descriptions; elsewhere the plain
cosine is, and a line says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from ..hub.bases import family
from ..hub.errors import RetrievalError

if TYPE_CHECKING:
    from ..hub.catalog import Catalog
    from ..hub.transfer import Measured
    from .encoders.text import TextEncoder
    from .transfer import Similarity

FEWEST = 8  # tasks with experts without which nothing can be fitted and checked
FOLDS = 4
STEPS = 100  # more than these gained nothing on the built-in example
SUFFIX = ".safetensors"

Vectors = NDArray[np.float32]


class Matrix(NamedTuple):
    """Tasks with experts of their own, how good each of these is on each (experts, tasks), and the base (tasks,).

    Expert i is that of task i.
    """

    tasks: tuple[Measured, ...]
    scores: Vectors
    bare: NDArray[np.float64]


def matrix(tasks: Sequence[Measured]) -> Matrix:
    """What was measured in full: tasks whose experts were tried on all of them. May be empty."""
    owned = {one.expert: one for one in tasks if one.expert is not None and one.bare is not None}
    while owned:
        gaps = {id_: sum(id_ not in one.scores or other not in owned[id_].scores for other, one in owned.items())
                for id_ in owned}  # fmt: skip
        worst = max(gaps, key=lambda id_: gaps[id_])
        if not gaps[worst]:
            break
        del owned[worst]
    kept = tuple(sorted(owned.values(), key=lambda one: one.name))
    scores = np.array([[one.scores[str(row.expert)] for one in kept] for row in kept]).reshape(len(kept), len(kept))
    return Matrix(kept, scores.astype(np.float32), np.array([one.bare for one in kept], np.float64))


def similarity_path(home: Path, base: str) -> Path:
    """Where the similarity for a base lies, if there is one."""
    return home / "similarities" / (quote(family(base), safe="") + SUFFIX)


def fit_own(catalog: Catalog, base: str, encoder: TextEncoder, *, seed: int = 0) -> Similarity:
    """A similarity fitted to the catalogue's measured transfer and validated on tasks left out; saved for the base.

    encoder: with whose cosines it is compared. Raises RetrievalError where fewer than FEWEST experts were measured on
    one another's tasks.
    """
    measured = matrix(catalog.transfer(base))
    if len(measured.tasks) < FEWEST:
        raise RetrievalError(
            f"{len(measured.tasks)} experts for {base} were measured on one another's tasks, expected at least "
            f"{FEWEST}: run `lorahub generator measure` on more"
        )
    found = fitted(measured, encoder, seed=seed)
    path = similarity_path(catalog.home, base)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path, force=True)
    return found


def fitted(measured: Matrix, encoder: TextEncoder, *, folds: int = FOLDS, seed: int = 0) -> Similarity:
    """The same without a catalogue, of the matrix alone; folds 0 leaves the validation out."""
    from .transfer import fit_similarity, folded, ranked

    words = reading(encoder)
    texts = [list(one.texts) or [one.name] for one in measured.tasks]
    vectors = [words.encode(some) for some in texts]
    given: dict[str, Any] = {"space": words.space, "width": encoder.dim, "steps": STEPS, "seed": seed}
    whole = fit_similarity(vectors, measured.scores, **given)
    if not folds:
        return whole
    parts = folded(vectors, measured.scores, folds=min(folds, len(vectors) // 2), **given)
    plain = [encoder.encode(some) for some in texts]
    return replace(whole, ranking=ranked(vectors, measured.scores, parts, plain))


def reading(encoder: TextEncoder) -> TextEncoder:
    """What the similarity reads: the encoder's token states; its sentence vectors where it gives none."""
    from .wording import token_states

    try:
        return token_states(encoder)
    except RetrievalError:
        return encoder


@dataclass(frozen=True)
class LearnedWords:
    """A text encoder whose cosines are a learned similarity. words: whose vectors the similarity reads."""

    similarity: Similarity
    words: TextEncoder

    @property
    def space(self) -> str:
        return f"{self.words.space}:learned"

    @property
    def dim(self) -> int:
        return self.similarity.sizes[0]

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors (n, dim), one for each text."""
        return self.similarity.project(self.words.encode(texts))


def ranker(home: Path, base: str, encoder: TextEncoder) -> tuple[LearnedWords | None, str]:
    """The learned similarity of a base where there is one that chooses better than the encoder, and a line that says so
    or why not. Raises FormatError for a damaged file."""
    path = similarity_path(home, base)
    if not path.is_file():
        return None, "by their descriptions' cosine (no similarity was learned: lorahub generator measure)"
    from .transfer import load
    from .wording import matching

    found = load(path)
    try:
        words = matching(found.space, encoder)
    except RetrievalError:
        return None, f"by their descriptions' cosine (the learned similarity reads {found.space!r})"
    if found.ranking is None or not found.ranking.better:
        return None, "by their descriptions' cosine (the learned similarity chose no better on tasks left out)"
    told = f"{found.ranking.learned:.3f} instead of {found.ranking.plain:.3f} on tasks left out"
    return LearnedWords(found, words), f"by the similarity that was learned from measured transfer ({told})"
