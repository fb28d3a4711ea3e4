"""What an adapter says of itself: header, configuration, model card and sidecars, read into one description."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bases import Base, from_metadata
from .source import Source

_LEAST_WORDS = 3  # of a paragraph that can be a description
_TEXT_LIMIT = 2000  # characters of a description that are kept; a card can be a book
_FILE_LIMIT = 4 * 1024 * 1024  # bytes; a larger sidecar is none
_READ_LIMIT = 10_000  # characters of a card or an entry that are looked at
_YAML_LIMIT = 4_000  # characters of a card's head: the parser's time grows with the square
_NAME_LIMIT = 200  # characters of a title, a tag, a trigger or a base
_TAGS_KEPT = 24
_WORDS_KEPT = 100  # triggers, or tags in all


_NONE = {"", "~", "null", "Null", "NULL"}  # YAML's words for nothing

UNKNOWN = Base(None, None)


@dataclass(frozen=True)
class Description:
    """Words about an adapter, from the file and the files beside it."""

    title: str | None = None
    text: str = ""
    triggers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    base: Base = UNKNOWN


def describe(source: Source) -> Description:
    """Gather the description; whoever speaks first wins a single field, lists are united."""
    found = [_from_sidecars(source.weights), _from_header(source.metadata), _from_card(source)]
    configured = _texts((source.config or {}).get("base_model_name_or_path"))
    if configured:
        found.insert(0, Description(base=Base(configured[0], "adapter_config.json")))
    return Description(
        title=next((_tidy(one.title)[:_NAME_LIMIT] for one in found if one.title), None) or None,
        text=" ".join(dict.fromkeys(_tidy(one.text) for one in found if one.text))[:_TEXT_LIMIT],
        triggers=_unique(word for one in found for word in one.triggers),
        tags=_unique(word for one in found for word in one.tags),
        base=next((_short(one.base) for one in found if one.base.name), UNKNOWN),
    )


def sidecars(weights: Path) -> list[Path]:
    """Files beside a weight file in which collectors' tools keep its metadata; they are read, never written."""
    return [weights.with_name(weights.stem + ending) for ending in (".metadata.json", ".civitai.info", ".json")]


def _from_header(metadata: Mapping[str, str]) -> Description:
    triggers = [*_phrases(metadata.get("modelspec.trigger_phrase", "")), *_comment_triggers(metadata)]
    tags = [*_phrases(metadata.get("modelspec.tags", "")), *_frequent_tags(metadata)]
    text = " ".join(
        part
        for part in (
            metadata.get("modelspec.description", ""),
            metadata.get("modelspec.usage_hint", ""),
            _meaningful(metadata.get("ss_training_comment", "")),
        )
        if part
    )
    title = metadata.get("modelspec.title") or _meaningful(metadata.get("ss_output_name", ""))
    return Description(title or None, text, tuple(triggers), tuple(tags), from_metadata(metadata))


def _comment_triggers(metadata: Mapping[str, str]) -> list[str]:
    comment = metadata.get("ss_training_comment", "")[:_READ_LIMIT]
    found = re.search(r"trigger(?:\s*words?)?\s*(?:is|are|:|=)\s*(.+)", comment, re.I)
    return _phrases(found[1].replace("\\", "")) if found else []


def _frequent_tags(metadata: Mapping[str, str]) -> list[str]:
    table = _json(metadata.get("ss_tag_frequency", ""))
    counts: dict[str, float] = {}
    for folder in table.values() if isinstance(table, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, (int, float)):
                word = str(tag).strip().replace("\\", "")
                counts[word] = counts.get(word, 0.0) + count
    return [tag for tag, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_TAGS_KEPT] if tag]


def _from_card(source: Source) -> Description:
    """The README of a PEFT directory; a README beside a single file describes its repository, not the file."""
    if source.config is None:
        return Description()
    front, text = _front_matter(_text(source.weights.parent / "README.md")[:_READ_LIMIT])
    heading = re.search(r"^#[ \t]+(.+)$", text, re.M)
    prose = re.sub(r"(?s:```.*?```|<!--.*?-->)|^#.*$|!?\[([^\[\]\n]*)\]\([^)\n]*\)|^\s*\|.*$", r"\1", text, flags=re.M)
    boilerplate = "[More Information Needed]" in text or "Provide a quick summary" in text
    bases = _texts(front.get("base_model"))
    return Description(
        title=heading[1].strip() if heading and not boilerplate else None,
        text="" if boilerplate else _lead(prose),
        triggers=tuple(word for text in _texts(front.get("instance_prompt")) for word in _phrases(text)),
        tags=tuple(_texts(front.get("tags"))),
        base=Base(bases[0], "model card") if bases else UNKNOWN,
    )


def _lead(prose: str) -> str:
    """The first paragraph that says something; the rest of a card is about training, and much the same in all."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", prose))
    return next((text for text in paragraphs if len(re.findall(r"\w{2,}", text)) >= _LEAST_WORDS), "")


def _front_matter(card: str) -> tuple[Mapping[str, Any], str]:
    """The YAML at the head of a card (all its scalars as text) and the rest."""
    if not card.startswith("---"):
        return {}, card
    import yaml

    head, _, text = card[3:].partition("\n---")
    if len(head) > _YAML_LIMIT:
        head = head[: head.rfind("\n", 0, _YAML_LIMIT) + 1]
    try:
        return _table(yaml.load(head, yaml.BaseLoader)), text
    except (yaml.YAMLError, RecursionError):
        return {}, text


def _from_sidecars(weights: Path) -> Description:
    found = Description()
    for path in sidecars(weights):
        data = _json(_text(path))
        if isinstance(data, dict) and path.name not in {"adapter_config.json", "config.json"}:
            found = _sidecar(data)
            break
    return found


def _sidecar(data: Mapping[str, Any]) -> Description:
    model = _table(data.get("model"))
    civitai = _table(data.get("civitai"))
    words = data.get("trainedWords") or civitai.get("trainedWords") or data.get("activation text")
    tags = data.get("tags") or model.get("tags")
    title = data.get("model_name") or model.get("name") or data.get("name")
    parts = (data.get("modelDescription"), data.get("description"), data.get("notes"))
    base = data.get("base_model") or data.get("baseModel")
    return Description(
        title=title if isinstance(title, str) else None,
        text=" ".join(re.sub(r"<[^<>]+>", " ", text[:_READ_LIMIT]) for part in parts for text in _texts(part)),
        triggers=tuple(_phrases(words) if isinstance(words, str) else _texts(words)),
        tags=tuple(_texts(tags)) if isinstance(tags, list) else (),
        base=Base(base, "sidecar") if isinstance(base, str) and base else UNKNOWN,
    )


def _texts(value: Any) -> list[str]:
    """The texts in a value that should be one, or a list of them; whatever else it holds is left out."""
    found = value if isinstance(value, list) else [value]
    return [text for text in found[:_WORDS_KEPT] if isinstance(text, str) and text.strip() not in _NONE]


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _phrases(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"[,;\n]", text[:_READ_LIMIT]) if part.strip()]


def _meaningful(text: str) -> str:
    return "" if text.strip().lower() in {"", "none", "null", "last"} else text.strip()


def _text(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size <= _FILE_LIMIT:
            return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        pass
    return ""


def _json(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _tidy(text: str) -> str:
    """The text on one line, without what is no character or rules a terminal."""
    text = text[:_READ_LIMIT]
    if not text.isprintable():
        text = "".join(sign if sign.isprintable() else " " for sign in text)
    return " ".join(text.split())


def _short(base: Base) -> Base:
    return Base(_tidy(base.name or "")[:_NAME_LIMIT] or None, _tidy(base.origin or "")[:_NAME_LIMIT] or None)


def _unique(words: Iterable[str]) -> tuple[str, ...]:
    tidy = dict.fromkeys(_tidy(word[:_NAME_LIMIT]) for word in words)
    return tuple(word for word in tidy if word)[:_WORDS_KEPT]
