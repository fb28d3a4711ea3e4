"""Which files under a path may be adapters: found by name and a stat, never opened.

A folder with an `adapter_config.json` is one candidate together with its weights; any other file with a suffix that
weights use is a candidate by itself. Everything of that kind comes out exactly once, with a reason where reading it
would be wrong. Links to folders are followed, but never around a loop and never up.
"""

# Paths are plain strings here: a warm scan is little more than this file, and pathlib takes ten times as long.
# ruff: noqa: PTH100, PTH112, PTH116, PTH118, PTH122

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .errors import CatalogError

EXAMINATION = 1
"""Part of every stamp: raise it when the readers learn to see more, and every file is examined once again."""

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT takes the first that exists
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
CARD = "README.md"
SIDECARS = (".civitai.info", ".metadata.json", ".json")

Stat = Callable[[], os.stat_result]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file, or a folder in PEFT's layout, that may be an adapter.

    `stamp` changes when the weights or what describes them change; it is empty where `refusal` says why not to read.
    `size` (bytes) and `mtime` (seconds) are those of the file with the weights.
    """

    path: str
    stamp: str = ""
    size: int = 0
    mtime: float = 0.0
    refusal: str | None = None


def scan(
    paths: Iterable[Path | str],
    *,
    skip: Path | None = None,
    entering: Callable[[str], object] = lambda root: None,
) -> Iterator[Candidate]:
    """Every candidate under `paths` (files or folders), each once, in the order of `paths`, then by name.

    The folder `skip` is passed over. `entering` is called with each root before its candidates: the paths given, then
    folders that links lead to. Raises CatalogError for a path that does not exist.
    """
    queue = deque(roots(paths))
    entered: list[str] = []
    visited = _identity(skip) if skip else set()
    given: set[str] = set()
    while queue:
        root = queue.popleft()
        entering(root)
        if os.path.isdir(root):
            entered.append(root)
            candidates = _walk(root, visited, partial(_follow, entered, queue))
        else:
            candidates = _single(root)
        for candidate in candidates:
            if candidate.path not in given:
                given.add(candidate.path)
                yield candidate


def roots(paths: Iterable[Path | str]) -> list[str]:
    """The paths as locations: absolute, folders freed of links, a file's own name kept even where it is a link."""
    found = []
    for path in (os.fspath(path) for path in paths):
        if not os.path.lexists(path):
            raise CatalogError(f"{path}: no such file or folder; expected an adapter file or a folder with adapters")
        found.append(placed(path))
    return list(dict.fromkeys(found))


def stamp(path: str) -> str:
    """The stamp that a candidate at `path` (as `Candidate.path`) has now; empty if there is none."""
    if Path(path).is_dir():
        files = _listing(path, (CONFIG, CARD, *PEFT_WEIGHTS, *_described("adapter_model")))
        found = _candidates(path, files) if CONFIG in files else iter(())
    else:
        found = _single(path)
    return next((candidate.stamp for candidate in found if candidate.path == path), "")


def placed(path: str) -> str:
    """The path as a location: absolute, free of links except for a file that is one itself."""
    path = os.path.abspath(path)
    if os.path.isdir(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _identity(folder: Path) -> set[tuple[int, int]]:
    try:
        found = folder.stat()
    except OSError:
        return set()
    return {(found.st_dev, found.st_ino)}


def _walk(root: str, visited: set[tuple[int, int]], follow: Callable[[str, str], None]) -> Iterator[Candidate]:
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            found = os.stat(folder)
            if (found.st_dev, found.st_ino) in visited:
                continue
            visited.add((found.st_dev, found.st_ino))
            with os.scandir(folder) as entries:
                listing = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield Candidate(_printable(folder), refusal=f"the folder cannot be read: {error.strerror}")
            continue
        files: dict[str, Stat] = {}
        folders: list[str] = []
        for entry in listing:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                follow(folder, os.path.realpath(entry.path))
            else:
                files[entry.name] = entry.stat
        yield from _candidates(folder, files)
        pending.extend(reversed(folders))


def _follow(entered: list[str], queue: deque[str], folder: str, target: str) -> None:
    """Put the folder that a link in `folder` leads to on the list, unless it is one that we came through."""
    above = target.rstrip(os.sep) + os.sep
    if not any((place + os.sep).startswith(above) for place in (folder, *entered)):
        queue.append(target)


def _single(path: str) -> Iterator[Candidate]:
    """The candidate that the file at `path` is, or belongs to: PEFT's weights are nothing without their config."""
    folder, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    files = _listing(folder, (name, CONFIG, CARD, *PEFT_WEIGHTS, *_described(stem), *_described("adapter_model")))
    wanted = (path, folder) if name in (CONFIG, *PEFT_WEIGHTS) else (path,)
    found = [candidate for candidate in _candidates(folder, files, name) if candidate.path in wanted]
    exact = [candidate for candidate in found if candidate.path == path]
    yield from exact or found or [Candidate(_printable(path), refusal="not an adapter: its suffix is none of weights")]


def _listing(folder: str, names: Iterable[str]) -> dict[str, Stat]:
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: partial(os.stat, path) for name, path in paths.items() if os.path.lexists(path)}


def _described(stem: str) -> tuple[str, ...]:
    return tuple(stem + suffix for suffix in SIDECARS)


def _candidates(folder: str, files: Mapping[str, Stat], asked: str | None = None) -> Iterator[Candidate]:
    """The candidates among one folder's files; `asked` is one that the user named, so that its suffix counts."""
    weights = [name for name in files if (name == asked and name != CONFIG) or name.lower().endswith(SUFFIXES)]
    peft = None
    if CONFIG in files:
        peft = next((name for name in PEFT_WEIGHTS if name in files), None if weights else CONFIG)
    shared = _mark(files, CONFIG) + _mark(files, CARD) if CONFIG in files else ""
    if peft:
        yield _candidate(folder, files, peft, shared)
    within = os.path.join(folder, "")
    for name in weights:
        if name != peft:
            yield _candidate(within + name, files, name, shared)


def _candidate(path: str, files: Mapping[str, Stat], name: str, shared: str) -> Candidate:
    try:
        path.encode()
    except UnicodeEncodeError:
        return Candidate(_printable(path), refusal="its name is not valid UTF-8; rename it")
    try:
        found = files[name]()
    except OSError as error:
        return Candidate(path, refusal=f"cannot be read: {error.strerror}")
    if not stat.S_ISREG(found.st_mode):
        return Candidate(path, refusal="not a regular file")
    marks = f"{EXAMINATION}|{found.st_size}:{found.st_mtime_ns}{shared}"
    stem = name.rpartition(".")[0]
    for suffix in SIDECARS:
        if stem + suffix in files:
            marks += _mark(files, stem + suffix)
    return Candidate(path, marks, found.st_size, found.st_mtime)


def _mark(files: Mapping[str, Stat], name: str) -> str:
    if name not in files:
        return ""
    try:
        found = files[name]()
    except OSError:
        return f"|{name}:?"
    return f"|{name}:{found.st_size}:{found.st_mtime_ns}"


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
