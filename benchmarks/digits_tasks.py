"""The described image domains of the digits world: what is done to the pictures, and how people would say it.

DDD-48: eight geometries, two polarities and three corruptions of handwritten digits, 48 domains. Each has 24
descriptions from three templates; the first two templates' sixteen are the library's, the third's eight are queries.
Each factor has three phrases; a template uses two of them, so a query's sentence is always new, its phrases are not.
Eight more queries a domain, the strange ones, use phrases that occur nowhere else.

Turns are a smooth family: nineteen angles in steps of 10 degrees, told as numbers; every other one is held out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from generation_world import Split


@dataclass(frozen=True)
class Phrases:
    """What a factor's value is called: three phrases, and two strange ones that no description holds."""

    usual: tuple[str, str, str]
    strange: tuple[str, str]


GEOMETRIES = {
    "upright": Phrases(("upright", "standing straight", "not turned at all"), ("in the usual position", "unrotated")),
    "tilted right": Phrases(
        ("tilted to the right", "leaning right", "rotated slightly clockwise"),
        ("tipped a little towards the right", "slanted rightwards"),
    ),
    "tilted left": Phrases(
        ("tilted to the left", "leaning left", "rotated slightly anticlockwise"),
        ("tipped a little towards the left", "slanted leftwards"),
    ),
    "quarter right": Phrases(
        ("turned a quarter to the right", "rotated ninety degrees clockwise", "lying on the right side"),
        ("rotated by 90 degrees to the right", "given a clockwise quarter rotation"),
    ),
    "quarter left": Phrases(
        ("turned a quarter to the left", "rotated ninety degrees anticlockwise", "lying on the left side"),
        ("rotated by 90 degrees to the left", "given an anticlockwise quarter rotation"),
    ),
    "upside down": Phrases(
        ("upside down", "rotated by half a turn", "standing on the head"), ("head down", "rotated 180 degrees")
    ),
    "mirrored": Phrases(
        ("mirrored", "reflected left to right", "reversed as in a mirror"),
        ("in mirror image", "with left and right swapped"),
    ),
    "flipped": Phrases(
        ("flipped vertically", "flipped top to bottom", "reflected as in water"),
        ("flipped over the horizontal axis", "with top and bottom swapped"),
    ),
}
POLARITIES = {
    "light": Phrases(
        ("white on black", "in bright strokes on a dark background", "with light ink on dark paper"),
        ("in chalk on a blackboard", "pale on darkness"),
    ),
    "dark": Phrases(
        ("black on white", "in dark strokes on a bright background", "with dark ink on light paper"),
        ("in pencil on a white page", "dark on a pale ground"),
    ),
}
CORRUPTIONS = {
    "clean": Phrases(("clean", "crisp", "clear and sharp"), ("undistorted", "neat")),
    "noisy": Phrases(("noisy", "grainy", "covered in static"), ("speckled", "full of random dots")),
    "blurred": Phrases(("blurred", "blurry", "out of focus"), ("fuzzy", "smeared and soft")),
}
FACTORS = (GEOMETRIES, POLARITIES, CORRUPTIONS)
ANGLES = {
    "upright": 0.0,
    "tilted right": -35.0,
    "tilted left": 35.0,
    "quarter right": -90.0,
    "quarter left": 90.0,
    "upside down": 180.0,
    "mirrored": 0.0,
    "flipped": 0.0,
}
TEMPLATES = (
    "classify handwritten digits {0}, {1}, {2}",
    "{2} images of numerals, {1} and {0}",
    "which number is written here? the figures are {1}, they are {0}, the picture is {2}",
)
TAUGHT = ((0, 1), (1, 2))  # of the phrases, in the templates that the library's descriptions follow
ASKED = (0, 2)  # and in the queries' template
TURNS = tuple(range(-90, 91, 10))
_TURN_WORDS = (
    "digits turned {0} degrees {1}",
    "handwritten numbers rotated {1} by {0} degrees",
    "numerals that lean {0} degrees {1}",
    "which number is this? it was turned {1}, through {0} degrees",
    "figures with {0} degrees of {1} rotation",
)


@dataclass(frozen=True)
class Domain:
    """One image domain.

    angle: degrees anticlockwise; mirror, flip: before the turn, left to right and top to bottom; dark: ink on a bright
    ground; corruption: clean, noisy or blurred. descriptions: the library's; queries, strange: what is asked with.
    """

    name: str
    descriptions: tuple[str, ...]
    queries: tuple[str, ...]
    strange: tuple[str, ...] = ()
    angle: float = 0.0
    mirror: bool = False
    flip: bool = False
    dark: bool = False
    corruption: str = "clean"


def described_domains() -> tuple[Domain, ...]:
    """All 48, geometries slowest."""
    return tuple(_domain(*values) for values in product(*FACTORS))


def _domain(geometry: str, polarity: str, corruption: str) -> Domain:
    found = [factor[value] for factor, value in zip(FACTORS, (geometry, polarity, corruption), strict=True)]

    def told(template: str, places: Sequence[int]) -> list[str]:
        return [template.format(*some) for some in product(*([one.usual[at] for at in places] for one in found))]

    taught = [text for template, places in zip(TEMPLATES, TAUGHT, strict=False) for text in told(template, places)]
    return Domain(
        name=f"{geometry}, {polarity}, {corruption}",
        descriptions=tuple(taught),
        queries=tuple(told(TEMPLATES[2], ASKED)),
        strange=tuple(TEMPLATES[2].format(*some) for some in product(*(one.strange for one in found))),
        angle=ANGLES[geometry],
        mirror=geometry == "mirrored",
        flip=geometry == "flipped",
        dark=polarity == "dark",
        corruption=corruption,
    )


def turned_domains() -> tuple[Domain, ...]:
    """The smooth family, from 90 degrees to the left to 90 to the right."""
    return tuple(_turned(angle) for angle in TURNS)


def _turned(angle: int) -> Domain:
    side = "clockwise" if angle > 0 else "anticlockwise"
    texts = [template.format(abs(angle), side) for template in _TURN_WORDS]
    return Domain(f"turned {angle}", tuple(texts[:3]), tuple(texts[3:]), angle=-float(angle))


def split(number: int, held: int = 12) -> Split:
    """The split of this number of the 48: `held` combinations held out, every factor's value still among the taught."""
    chance, domains = random.Random(f"split {number}"), list(product(*FACTORS))
    while True:
        out = frozenset(chance.sample(range(len(domains)), held))
        rest = [values for place, values in enumerate(domains) if place not in out]
        if all({values[at] for values in rest} == set(factor) for at, factor in enumerate(FACTORS)):
            taught = tuple(place for place in range(len(domains)) if place not in out)
            return Split(taught, tuple(sorted(out)))


def turned_split() -> Split:
    """Every other angle held out; both ends are taught."""
    places = range(len(TURNS))
    return Split(tuple(places[::2]), tuple(places[1::2]))
