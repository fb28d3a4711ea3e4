"""When a request is too far from a library to generate for: a limit that the library itself sets.

A cosine means nothing by itself: how high it is between unrelated sentences differs from text model to text model, and
how near a fitting request comes differs from library to library. Two measurements stand for that. Unrelated requests
(`UNRELATED`, about everything that adapters are made for) say what a library reaches by accident; its own tasks, each
with its own expert left out, say what a fitting request reaches. The limit lies between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..index.encoders.text import TextEncoder
    from .library import Vectors

# Wishes of many kinds. A few of them fit almost any library, and do no harm: their median is what counts.
UNRELATED = (
    "write a cover letter", "translate menus into Portuguese", "oil portrait of a queen", "predict house prices",
    "find bugs in JavaScript", "read handwriting aloud", "answer questions about physics", "a castle in isometric view",
    "sing in a deep voice", "summarise meeting minutes", "classify X-ray images", "plan a robot's path",
    "win at backgammon", "name colours in photographs", "write haiku", "generate molecules with low toxicity",
    "detect spam", "colour black and white films", "forecast rainfall", "chat like a pirate", "draw floor plans",
    "solve geometry exercises", "extract tables from scanned pages", "tell fake news from real news",
    "convert units", "tattoo designs", "identify plants", "subtitle lectures", "write assembly language",
    "imitate a celebrity", "segment roads in aerial views", "recommend books", "ask riddles", "tune a PID controller",
    "turn sketches into logos", "count words", "predict stock returns", "compress video", "teach Italian verbs",
    "recognise faces", "describe pictures to blind people", "anime girl with blue hair", "remix techno tracks",
    "estimate poses of dancers", "rank search results", "decide legal cases", "mark up XML", "find exoplanets",
)  # fmt: skip

AMONG = 0.05  # share of the library's own tasks that may lie below what is taken for "as its own tasks are"
# Where the limit lies, from what unrelated requests reach (0) to what the library's own tasks do (1); chosen on one
# half of the requests of benchmarks/abstention.py
BETWEEN = 0.6
FEWEST = 8  # experts without which leaving one out says nothing


@dataclass(frozen=True)
class Limit:
    """The similarity from which on a library serves a request.

    unrelated: what the median unrelated request reaches; own: what all but a twentieth of the library's tasks reach
    with their own expert left out, None where there are too few to say.
    """

    value: float
    unrelated: float
    own: float | None


def limit(vectors: Vectors, encoder: TextEncoder) -> Limit:
    """The limit of a library whose descriptions have these unit vectors (n, dim), by the encoder that made them."""
    reached = (encoder.encode(list(UNRELATED)) @ vectors.T).max(axis=1)
    return between(vectors, reached)


def between(vectors: Vectors, reached: Vectors) -> Limit:
    """The same from the cosine that each unrelated request has with its nearest expert.

    With fewer than FEWEST experts, or where the library's tasks are as far from one another as from anything, the limit
    is what nearly no unrelated request reaches: their median and three deviations (by their median absolute deviation).
    """
    middle = float(np.median(reached))
    firm = middle + 3 * 1.4826 * float(np.median(np.abs(reached - middle)))
    if len(vectors) < FEWEST:
        return Limit(firm, middle, None)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1.0)
    own = float(np.quantile(cosines.max(axis=1), AMONG))
    if own <= middle:
        return Limit(firm, middle, own)
    return Limit(middle + BETWEEN * (own - middle), middle, own)
