"""What the catalogue answers with: an adapter it knows, what became of a file, where an adapter came from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["added", "duplicate", "rejected", "unchanged"]

_TEXT_LIMIT = 2000  # characters; encoders read a few hundred tokens


@dataclass(frozen=True)
class Entry:
    """An adapter in the catalogue, as one row with its tags and locations.

    `id` is the beginning of `digest`, the hash of the adapter's content. `rank_min` and `rank_max` are 0 where nothing
    is low-rank. `base_from` says where the base's name comes from ("given" by the user, or what it was guessed from).
    `mergeable` false comes with the `reason`. `locations` are paths, some of which may no longer exist; `blob` is the
    hash of the catalogue's own copy, if it keeps one. `created` is ISO 8601 in UTC.
    """

    id: str
    name: str
    digest: str
    base: str | None
    base_from: str | None
    format: str
    rank_min: int
    rank_max: int
    modules: int
    parameters: int
    description: str
    title: str | None
    triggers: tuple[str, ...]
    tags: tuple[str, ...]
    mergeable: bool
    reason: str | None
    created: str
    locations: tuple[str, ...]
    extras: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    blob: str | None = None

    def text(self) -> str:
        """What the adapter says of itself, as sentences: the text that is embedded for search."""
        return sentences(self.name, self.title, self.description, self.triggers, self.tags)

    @property
    def text_digest(self) -> str:
        """Hash of `text()`: the input digest of its vector in a space of words."""
        return text_digest(self.text())


@dataclass(frozen=True, slots=True)
class Added:
    """What became of one file or PEFT folder that was offered to the catalogue.

    `id`, `name`, `format`, `rank`, `modules` are None for what was rejected; `reason` says why it was, or why the
    adapter cannot be merged, or what it is a duplicate of.
    """

    id: str | None
    name: str | None
    path: str
    format: str | None
    base: str | None
    rank: int | None
    modules: int | None
    mergeable: bool
    status: Status
    reason: str | None


@dataclass(frozen=True)
class Link:
    """One parent of an adapter that was made from others; parents keep their name and hash after they are removed."""

    child: str
    parent: str
    parent_name: str
    parent_digest: str
    weight: float
    operation: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    version: str = ""
    created: str = ""


def rejection(path: str, reason: str) -> Added:
    """The outcome for a file that is no adapter, or none that can be read."""
    return Added(None, None, path, None, None, None, None, False, "rejected", reason)


def identity(digest: str) -> str:
    """The id of the content with that digest."""
    return digest[:16]


def sentences(name: str, title: str | None, description: str, triggers: Iterable[str], tags: Iterable[str]) -> str:
    """Title (or the name as words), description, triggers and tags, each its own sentence; nothing twice."""
    parts = [title or words(name), description, ", ".join(triggers), ", ".join(tags)]
    tidy = (" ".join(part.split()).rstrip(" .") for part in parts)
    return ". ".join(dict.fromkeys(part for part in tidy if part))[:_TEXT_LIMIT]


def words(name: str) -> str:
    """A name as the words it is made of: "WatercolorStyle_v2-fp16" -> "Watercolor Style v2 fp16"."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(re.split(r"[\s_\-./\\+]+", apart)).strip() or name


def text_digest(text: str) -> str:
    """sha256 of the text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def storable(text: str) -> str:
    """The text without what no database keeps: NUL, and halves of characters."""
    if "\0" in text:
        text = text.replace("\0", " ")
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
