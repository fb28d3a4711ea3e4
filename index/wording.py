"""What each word of a description says: the token states of an early layer, one long vector for each text.

A sentence's own vector puts its manner before its content: descriptions in one wording are near to one another whatever
they ask for, and "tilted to the left" is hardly told from "to the right". The token states of the third layer still
hold every word in its context, and a reader that learns which of them to look at (index.transfer, the generator hyper)
tells such tasks apart, in new combinations and new sentences too. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..hub.errors import BadOption, RetrievalError
from .bert import BertEncoder, _normed
from .encoders.text import TextEncoder, text

LAYERS = 3
PLACES = 48  # tokens of a text that are kept, those at its beginning; a sentence has 10 to 40

Vectors = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TokenStates:
    """A text encoder whose vectors are token states, one after the other, and zeros where a text has no more.

    encoder: with as many layers as are wanted. The vectors are of length places * width, and of norm 1 as a whole.
    """

    encoder: BertEncoder
    places: int

    @property
    def space(self) -> str:
        return f"{self.encoder.space}:tokens-{len(self.encoder.layers)}x{self.encoder.dim}"

    @property
    def dim(self) -> int:
        return self.places * self.encoder.dim

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors (n, places * width), one for each text."""
        vectors = np.zeros((len(texts), self.places, self.encoder.dim), np.float32)
        for row, said in enumerate(texts):
            states = _states(self.encoder, said)[: self.places]
            vectors[row, : len(states)] = states
        flat = vectors.reshape(len(texts), -1)
        return cast(Vectors, flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12))


def token_states(encoder: TextEncoder | None = None, *, layers: int = LAYERS, places: int = PLACES) -> TokenStates:
    """The token states after `layers` layers of an encoder, by default of the packaged one.

    Raises RetrievalError for an encoder whose layers cannot be reached, BadOption for numbers outside their range.
    """
    whole = text() if encoder is None else encoder
    if not isinstance(whole, BertEncoder):
        raise RetrievalError(f"the text model {whole.space!r} gives no token states; use the packaged one")
    if not 1 <= layers <= len(whole.layers) or places < 1:
        raise BadOption(f"layers is {layers}, places {places}; expected 1 to {len(whole.layers)}, and at least 1")
    return TokenStates(replace(whole, layers=whole.layers[:layers]), places)


def matching(space: str, encoder: TextEncoder) -> TextEncoder:
    """The encoder whose vectors are of a space: the given one, or its token states.

    Raises RetrievalError where it is neither.
    """
    if encoder.space == space:
        return encoder
    found = re.fullmatch(re.escape(encoder.space) + r":tokens-(\d+)x\d+", space)
    states = token_states(encoder, layers=int(found[1])) if found and isinstance(encoder, BertEncoder) else None
    if states is None or states.space != space:
        raise RetrievalError(f"the text model {encoder.space!r} makes no vectors of the space {space!r}; name another")
    return states


def token_width(space: str, dim: int) -> int:
    """How many numbers each token has in a space of vectors of length `dim`; all of them where it holds no tokens."""
    found = re.search(r":tokens-\d+x(\d+)$", space)
    return int(found[1]) if found and dim % int(found[1]) == 0 else dim


def _states(encoder: BertEncoder, said: str) -> Vectors:
    """One text's token states (tokens, width)."""
    ids = encoder.tokenizer.encode(encoder._clean(said)).ids
    states = encoder.words[ids] + (encoder.positions[: len(ids)] + encoder.segment)
    states = _normed(states[None], encoder.embedding_norm, encoder.epsilon)
    shown = np.zeros((1, 1, 1, len(ids)), np.float32)
    for layer in encoder.layers:
        states = encoder._layer(states, shown, layer)
    return cast(Vectors, states[0])
