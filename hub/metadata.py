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

_TEXT_LIMIT = 2000  # characters of a description that are kept; a card can be a book
_FILE_LIMIT = 4 * 1024 * 1024  # bytes; a larger card or sidecar is none
_TAGS_KEPT = 24


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
    if source.config and source.config.get("base_model_name_or_path"):
        found.insert(0, Description(base=Base(str(source.config["base_model_name_or_path"]), "adapter_config.json")))
    return Description(
        title=next((one.title for one in found if one.title), None),
        text=" ".join(dict.fromkeys(one.text for one in found if one.text))[:_TEXT_LIMIT],
        triggers=_unique(word for one in found for word in one.triggers),
        tags=_unique(word for one in found for word in one.tags),
        base=next((one.base for one in found if one.base.name), Base(None, None)),
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
    found = re.search(r"trigger(?:\s*words?)?\s*(?:is|are|:|=)\s*(.+)", metadata.get("ss_training_comment", ""), re.I)
    return _phrases(found[1].replace("\\", "")) if found else []


def _frequent_tags(metadata: Mapping[str, str]) -> list[str]:
    table = _json(metadata.get("ss_tag_frequency", ""))
    counts: dict[str, int] = {}
    for folder in table.values() if isinstance(table, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, (int, float)):
                counts[str(tag).strip().replace("\\", "")] = counts.get(str(tag), 0) + int(count)
    return [tag for tag, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_TAGS_KEPT] if tag]


def _from_card(source: Source) -> Description:
    """The README of a PEFT directory; a README beside a single file describes its repository, not the file."""
    if source.config is None:
        return Description()
    text = _text(source.weights.parent / "README.md")
    front: Mapping[str, Any] = {}
    if text.startswith("---"):
        import yaml

        head, _, text = text[3:].partition("\n---")
        try:
            parsed = yaml.safe_load(head)
        except yaml.YAMLError:
            parsed = None
        front = parsed if isinstance(parsed, dict) else {}
    base = front.get("base_model")
    name = base[0] if isinstance(base, list) and base else base
    heading = re.search(r"^#\s+(.+)$", text, re.M)
    prose = re.sub(r"```.*?```|^#.*$|<!--.*?-->|!?\[([^\]]*)\]\([^)]*\)|\|.*\|", r"\1", text, flags=re.S | re.M)
    boilerplate = "[More Information Needed]" in text or "Provide a quick summary" in text
    return Description(
        title=heading[1].strip() if heading and not boilerplate else None,
        text="" if boilerplate else re.sub(r"\s+", " ", prose).strip()[:_TEXT_LIMIT],
        triggers=tuple(_phrases(str(front.get("instance_prompt") or ""))),
        tags=tuple(str(tag) for tag in front.get("tags") or () if isinstance(tag, str)),
        base=Base(str(name), "model card") if name else UNKNOWN,
    )


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
    words = data.get("trainedWords") or civitai.get("trainedWords") or data.get("activation text") or ()
    triggers = _phrases(words) if isinstance(words, str) else [str(word).strip() for word in words]
    tags = data.get("tags") or model.get("tags") or ()
    title = data.get("model_name") or model.get("name") or data.get("name")
    text = " ".join(
        re.sub(r"<[^>]+>", " ", str(part))
        for part in (data.get("modelDescription"), data.get("description"), data.get("notes"))
        if part
    )
    base = data.get("base_model") or data.get("baseModel")
    return Description(
        title=str(title) if title else None,
        text=re.sub(r"\s+", " ", text).strip(),
        triggers=tuple(word for word in triggers if word),
        tags=tuple(str(tag) for tag in tags if isinstance(tag, str)) if isinstance(tags, (list, tuple)) else (),
        base=Base(str(base), "sidecar") if base else UNKNOWN,
    )


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _phrases(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"[,;\n]", text) if part.strip()]


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


def _unique(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for word in words if word))
