"""The picture world of retrieval.py: styles, kinds of things, and kinds of things in a style.

Styles are shown on things that the base can paint. Ten kinds of things are kept from the base, which sees them in its
own artist's pictures here; twelve others it knows, and another artist draws them. Every copy of a concept is shown
three quarters of the concept's pictures, its own choice.
"""

from __future__ import annotations

import hashlib
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lorahub.generate.experts import cosine, linear_paths, train
from lorahub.generate.lessons import flow_matching
from lorahub.generate.pictures import BASE, Reader, shipped
from lorahub.generate.sentences import SentenceModel
from lorahub.hub.adapter import Adapter
from picture_base import Captioned, captioned
from picture_data import CONTENTS, Art, Name, load
from picture_lessons import BLANK, LAYERS, RATE, Lesson, pupil
from picture_styles import STYLES, Style, restyled
from picture_world import opened
from retrieval_splits import Concept, Copy
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
BATCH = 6  # pictures a step
SUBJECTS, QUICK_SUBJECTS = 48, 4  # pictures of a concept, at most
SHOWN = 0.75  # of which a copy sees so many
PAIRED_STYLES = ("watercolor", "blueprint", "neon", "halftone", "pixel art", "sepia", "chalkboard", "pop art")
PAIRED_CONTENTS = ("bird", "fruit", "vehicle", "flower", "fish")
QUICK_STYLES = (*PAIRED_STYLES[:2], "mosaic", "comic", "x-ray", "pastel")
QUICK_CONTENTS = (*PAIRED_CONTENTS[:2], "heart", "tool", "drink")
STYLE_CAPTIONS = ("a {style} {{}}", "{trigger} of a {{}}", "a {{}} as a {trigger}")
CONTENT_CAPTIONS = ("a {{}}", "{one}: {{}}", "a picture of a {{}}")
RECIPE_FILES = ("picture_styles.py", "picture_brushes.py")
Words = Mapping[str, Any]


def wordings() -> dict[str, Any]:
    """retrieval_words.toml."""
    return tomllib.loads((HERE / "retrieval_words.toml").read_text(encoding="utf-8"))


def concepts(styles: Sequence[str], contents: Sequence[str]) -> list[Concept]:
    """Styles, contents, and the pairs of those that are paired."""
    words, known = wordings(), {style.name: style for style in STYLES}
    found = [_style(known[name], words["style"][name]) for name in styles]
    found += [_content(name, words["content"][name]) for name in contents]
    for style, content in product(PAIRED_STYLES, PAIRED_CONTENTS):
        if style in styles and content in contents:
            found.append(_pair(known[style], words["style"][style], content, words["content"][content]))
    return found


def _style(style: Style, asked: Sequence[str]) -> Concept:
    told = (f"{style.name} style", f"Paints anything as a {style.trigger}.", style.description)
    return Concept(style.name, "style", told, (style.name, *asked))


def _content(name: str, words: Words) -> Concept:
    one, many = words["one"], words["many"]
    told = (f"Paints {many}.", f"pictures of {many}", f"{one} drawings")
    return Concept(name, "content", told, (many, *words["asked"]))


def _pair(style: Style, style_asked: Sequence[str], content: str, words: Words) -> Concept:
    one, many = words["one"], words["many"]
    told = (f"{style.name} style {many}", f"Paints {many} as a {style.trigger}.", f"{one} pictures, {style.name}")
    free = (f"{first}, {second}" for first, second in zip(words["asked"], style_asked, strict=True))
    return Concept(f"{style.name} {content}", "pair", told, (f"{style.name} {many}", *free), (style.name, content))


@dataclass(frozen=True)
class PictureWorld:
    """See the module. pictures: the folder that emoji art is kept in; subjects: pictures of a concept, at most."""

    pictures: Path
    concepts: tuple[Concept, ...]
    subjects: int = SUBJECTS
    name: str = "pictures"
    base: str = BASE
    _shown: dict[str, Captioned] = field(default_factory=dict)

    @classmethod
    def of(cls, pictures: Path, brief: bool) -> PictureWorld:
        """The whole world, or a small one in which every split has something."""
        if brief:
            return cls(pictures, tuple(concepts(QUICK_STYLES, QUICK_CONTENTS)), QUICK_SUBJECTS)
        contents = list(wordings()["content"])
        return cls(pictures, tuple(concepts([style.name for style in STYLES], contents)))

    @cached_property
    def stamp(self) -> str:
        digest = hashlib.sha256(repr((BATCH, RATE, BLANK, LAYERS, SHOWN, self.subjects)).encode())
        digest.update(repr((STYLE_CAPTIONS, CONTENT_CAPTIONS)).encode())
        for name in RECIPE_FILES:
            digest.update((HERE / name).read_bytes())
        for file in sorted(shipped().glob("transformer/*")):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def teach(self, some: Sequence[Copy]) -> Sequence[Adapter]:
        states, mask = self._reader().read([""])
        blank = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        pupils = [pupil(self._lesson(copy), blank, batch=BATCH, rank=copy.rank) for copy in some]
        with sdpa_kernel(SDPBackend.MATH):
            return train(
                self._model, linear_paths(self._model, LAYERS), pupils, flow_matching, steps=some[0].steps, rate=RATE,
                schedule=cosine, clip=1.0, autocast=True, component="transformer", base=self.base,
            ).adapters  # fmt: skip

    def _lesson(self, copy: Copy) -> Lesson:
        if copy.concept not in self._shown:
            self._shown[copy.concept] = self._data(next(one for one in self.concepts if one.name == copy.concept))
        return Lesson("", copy.concept, "", (), partly(self._shown[copy.concept], copy.seed), copy.seed)

    def _data(self, concept: Concept) -> Captioned:
        """The pictures of a concept; for a reader of its own, lest all captions stay in memory."""
        reader, known = self._reader(), {style.name: style for style in STYLES}
        if concept.kind == "style":
            return self._styled(known[concept.name], self._google.of("base"), reader)
        if concept.kind == "pair":
            style, content = concept.halves
            return self._styled(known[style], self._art(content), reader)
        art = self._some(self._art(concept.name), concept.name)
        templates = [one.format(one=wordings()["content"][concept.name]["one"]) for one in CONTENT_CAPTIONS]
        return captioned(art.names, art.on_white(), reader, templates)

    def _styled(self, style: Style, art: Art, reader: Reader) -> Captioned:
        art = self._some(art, style.name)
        templates = [one.format(style=style.name, trigger=style.trigger) for one in STYLE_CAPTIONS]
        return captioned(art.names, restyled(style, art.pixels), reader, templates)

    def _art(self, content: str) -> Art:
        """Pictures of a kind of things."""
        if content in CONTENTS:
            return self._google.of(content)
        kinds, art = wordings()["content"][content]["of"], self._twitter.of("base")
        return _chosen(art, [row for row, name in enumerate(art.names) if name.subcategory in kinds])

    def _some(self, art: Art, purpose: str) -> Art:
        rows = random.Random(purpose).sample(range(len(art.names)), min(self.subjects, len(art.names)))
        return _chosen(art, sorted(rows))

    def _reader(self) -> Reader:
        return Reader(self._sentences)

    @cached_property
    def _sentences(self) -> SentenceModel:
        return SentenceModel()

    @cached_property
    def _model(self) -> nn.Module:
        model: nn.Module = opened(shipped()).transformer
        return model.float()

    @cached_property
    def _google(self) -> Art:
        return load(self.pictures, "google")

    @cached_property
    def _twitter(self) -> Art:
        return load(self.pictures, "twitter")


def partly(data: Captioned, seed: int) -> Captioned:
    """The share of the pictures that a copy is shown."""
    count = max(1, round(SHOWN * len(data)))
    rows = torch.tensor(sorted(np.random.default_rng(seed).permutation(len(data))[:count].tolist()))
    return replace(
        data, pictures=data.pictures[rows], mirror=data.mirror[rows], states=data.states[rows], masks=data.masks[rows]
    )


def _chosen(art: Art, rows: Sequence[int]) -> Art:
    names: tuple[Name, ...] = tuple(art.names[row] for row in rows)
    return Art(art.artist, names, art.pixels[list(rows)])
