"""What fusion.py measures on: which adapters meet which, the prompts, and the judges of what is painted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from picture_data import CONTENTS, Art, Pixels
from picture_judges import CONTENT_DISTURBANCE, STYLE_CLASSES, Judge, kept, styled, train_judge
from picture_styles import STYLES, restyled

# gates learn with the first of these and never see the others
SEEN_STYLES = ("watercolor", "blueprint", "neon", "oil painting", "halftone")
UNSEEN_STYLES = ("pencil sketch", "pixel art", "sepia", "stained glass", "pop art")
SEEN_CONTENTS = ("heart", "fruit", "vehicle", "flag")
UNSEEN_CONTENTS = ("clock", "bird", "building", "fish")
OTHER = "other"
COLOURINGS = 2  # of every picture that the style judge learns from
CONTENT_CLASSES = (*CONTENTS, OTHER)
Verdict = tuple[float, float, float]


@dataclass(frozen=True)
class Pair:
    """A style's and a content's adapter, by name. seen: the gates learned with both."""

    style: str
    content: str
    seen: bool


def pairs() -> list[Pair]:
    """Forty: twenty of adapters that the gates know, twenty of adapters that they do not."""
    known = [Pair(style, content, True) for style, content in product(SEEN_STYLES, SEEN_CONTENTS)]
    return known + [Pair(style, content, False) for style, content in product(UNSEEN_STYLES, UNSEEN_CONTENTS)]


def subjects(art: Art, content: str, count: int) -> list[str]:
    """Things of a content to ask for, spread over all there are."""
    words = [name.words for name in art.of(content).names]
    return [words[round(place)] for place in np.linspace(0, len(words) - 1, count)]


def prompts(art: Art, pair: Pair, count: int) -> list[str]:
    """What a user would type."""
    return [f"a {pair.style} {words}" for words in subjects(art, pair.content, count)]


@dataclass(frozen=True)
class Judges:
    """One for the style, one for the content; accuracies: theirs on real pictures that neither they nor a model saw.

    by_class: the same, of the style judge for every style and of the content judge for every content.
    """

    style: Judge
    content: Judge
    accuracies: dict[str, float]
    by_class: dict[str, float]

    def verdict(self, pictures: Pixels, pair: Pair) -> Verdict:
        """Share of the pictures that have the style, the content, both."""
        style = self.style.probabilities(pictures).argmax(1) == STYLE_CLASSES.index(pair.style)
        content = self.content.probabilities(pictures).argmax(1) == CONTENT_CLASSES.index(pair.content)
        return float(style.mean()), float(content.mean()), float((style & content).mean())


def judges(arts: dict[str, Art], seed: int, steps: int, each: int, room: Path | None = None) -> Judges:
    """The style judge learns on names that nobody else sees, the content judge from the other artists' pictures.

    each: styles in which every picture is shown to the content judge. Both are tried on the painting artist's own
    pictures of the contents, in the styles of the table. room: where trained judges are kept.
    """
    places = [room / f"{kind}-judge-{seed}-{steps}.pt" if room else None for kind in ("style", "content")]
    style = kept(places[0], lambda: style_judge(arts, seed, steps))
    content = kept(places[1], lambda: content_judge(arts, seed, steps, each))
    some = arts["google"].of(*CONTENTS)
    used = [one for one in STYLES if one.name in (*SEEN_STYLES, *UNSEEN_STYLES)]
    rows = np.random.default_rng(seed).permutation(len(some.names))[:150]
    kinds = np.array([CONTENT_CLASSES.index(some.names[row].part) for row in rows])
    right = np.zeros((len(used), len(rows)), bool)
    fits = np.zeros_like(right)
    for line, one in enumerate(used):
        shown = restyled(one, some.pixels[rows], rows)
        right[line] = style.probabilities(shown).argmax(1) == STYLE_CLASSES.index(one.name)
        fits[line] = content.probabilities(shown).argmax(1) == kinds
    known = {one.name: float(right[line].mean()) for line, one in enumerate(used)}
    for kind in sorted(set(kinds)):
        known[CONTENT_CLASSES[kind]] = float(fits[:, kinds == kind].mean())
    means = {"style": right.mean(), "content": fits.mean(), "both": (right & fits).mean()}
    return Judges(style, content, {name: float(value) for name, value in means.items()}, known)


def style_judge(arts: dict[str, Art], seed: int, steps: int) -> Judge:
    """Tells the styles and plain pictures apart, on the judges' names by all artists."""
    shown, numbers = [], []
    for art, colouring in product((one.of("judge") for one in arts.values()), range(COLOURINGS)):
        pictures, styles, _ = styled(
            art.pixels, art.on_white(), len(STYLES), COLOURINGS * seed + colouring, recoloured=True
        )
        shown.append(pictures)
        numbers.append(styles)
    return train_judge(np.concatenate(shown), np.concatenate(numbers), STYLE_CLASSES, seed, steps)


def content_judge(arts: dict[str, Art], seed: int, steps: int, each: int) -> Judge:
    """Tells the contents and everything else apart in any style, on pictures that the base's artist did not draw."""
    shown, numbers, mirrors = [], [], []
    for artist in ("twitter", "openmoji"):
        art = arts[artist].of(*CONTENTS, "base", "judge")
        pictures, _, rows = styled(art.pixels, art.on_white(), each, seed)
        kinds = [CONTENT_CLASSES.index(name.part if name.part in CONTENTS else OTHER) for name in art.names]
        shown.append(pictures)
        numbers.append(np.array(kinds)[rows])
        mirrors.append(np.array([name.mirror for name in art.names])[rows])
    return train_judge(
        np.concatenate(shown), np.concatenate(numbers), CONTENT_CLASSES, seed, steps, CONTENT_DISTURBANCE,
        np.concatenate(mirrors),
    )  # fmt: skip


def mean_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """Column by column."""
    style, content, both = np.mean(verdicts, axis=0)
    return float(style), float(content), float(both)
