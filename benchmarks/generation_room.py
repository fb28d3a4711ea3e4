"""A folder in which whatever took long to make is kept, named by a hash of what it is made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

Recipe = Mapping[str, Any]


def digest(recipe: Recipe) -> str:
    """A name for what a recipe makes: equal for equal recipes, whatever the order of their entries."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Room:
    """Things that are made once. Of several processes that want the same, one makes it and the others wait."""

    folder: Path

    def tensors(self, kind: str, recipe: Recipe, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors, as `make` makes them."""
        from safetensors.torch import load_file, save_file

        path = self._path(kind, recipe, "safetensors")
        with self._making(path) as missing:
            if missing:
                whole = {name: one.detach().contiguous() for name, one in make().items()}
                save_file(whole, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
        return load_file(path)

    def figures(self, kind: str, recipe: Recipe, make: Callable[[], Any]) -> Any:
        """Plain data, as `make` makes it."""
        path = self._path(kind, recipe, "json")
        with self._making(path) as missing:
            if missing:
                path.with_suffix(".part").write_text(json.dumps(make()), encoding="utf-8")
                path.with_suffix(".part").replace(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def _path(self, kind: str, recipe: Recipe, ending: str) -> Path:
        return self.folder / f"{kind}-{digest(recipe)}.{ending}"

    @contextmanager
    def _making(self, path: Path) -> Iterator[bool]:
        if path.exists():
            yield False
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            yield not path.exists()
