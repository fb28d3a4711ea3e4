"""BERT sentence embeddings in numpy: the forward pass of a sentence-transformers folder without torch.

Importing sentence_transformers costs seconds, which a single query does not repay. A folder that holds a float32 BERT
with mean pooling (all-MiniLM-L6-v2 is one) is run here instead, to the same vectors: weights are mapped, not read, so a
query touches the rows of its own words and the six layers, and nothing else.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ..hub.errors import FormatError
from ..hub.tensorfile import TensorFile, open_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = NDArray[np.float32]

BATCH_TOKENS = 1024  # tokens of one forward pass, padding included: wide enough for the BLAS, small enough for a cache
GELU_BLOCK = 32  # rows of the hidden layer worked on at once, so that the erf's passes stay in the second-level cache


class Affine(NamedTuple):
    """weight (outputs, inputs) and bias (outputs,), or a layer norm's gain and offset."""

    weight: Array
    bias: Array


class Layer(NamedTuple):
    """One encoder layer's weights."""

    query: Affine
    key: Affine
    value: Affine
    attended: Affine
    attended_norm: Affine
    widen: Affine
    narrow: Affine
    narrow_norm: Affine


@dataclass(frozen=True, eq=False)
class BertEncoder:
    """A sentence encoder; `space` names its vector space, `dim` is the vectors' length."""

    space: str
    tokenizer: Tokenizer
    words: Array
    positions: Array
    segment: Array
    embedding_norm: Affine
    layers: tuple[Layer, ...]
    heads: int
    epsilon: float
    lowercase: bool

    @property
    def dim(self) -> int:
        return int(self.words.shape[1])

    def encode(self, texts: Sequence[str]) -> Array:
        """Unit vectors (n, dim), one for each text; equal to SentenceTransformer.encode within 1e-5."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch([self._clean(text) for text in texts])]
        vectors = np.empty((len(ids), self.dim), np.float32)

        def fill(batch: Sequence[int]) -> None:
            vectors[batch] = self._forward([ids[index] for index in batch])

        # A batch for each core beats all cores on one batch: the BLAS' threads wait for each other, for long if others
        # are busy too.
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
            deque(pool.map(fill, _batches([len(each) for each in ids])), maxlen=0)
        return vectors

    def _clean(self, text: str) -> str:
        # a lone surrogate (a file name that is not UTF-8) has no UTF-8 form and would stop the tokenizer
        text = text.encode("utf-8", "replace").decode()
        return text.lower() if self.lowercase else text

    def _forward(self, ids: Sequence[Sequence[int]]) -> Array:
        lengths = np.array([len(each) for each in ids])
        width = int(lengths.max())
        tokens = np.array([[*each, *[0] * (width - len(each))] for each in ids])
        mask = (np.arange(width) < lengths[:, None]).astype(np.float32)
        states = self.words[tokens] + (self.positions[:width] + self.segment)
        states = _normed(states, self.embedding_norm, self.epsilon)
        hidden = (mask[:, None, None, :] - 1) * np.float32(1e9)  # added to the scores: padding gets no attention
        for layer in self.layers:
            states = self._layer(states, hidden, layer)
        pooled: Array = (states * mask[:, :, None]).sum(axis=1) / lengths[:, None].astype(np.float32)
        pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return pooled

    def _layer(self, states: Array, hidden: Array, layer: Layer) -> Array:
        batch, width, dim = states.shape

        def split(affine: Affine) -> Array:
            return _affine(states, affine).reshape(batch, width, self.heads, -1).transpose(0, 2, 1, 3)

        scores = split(layer.query) @ split(layer.key).transpose(0, 1, 3, 2)
        scores *= np.float32((dim // self.heads) ** -0.5)
        context = _softmax(scores + hidden) @ split(layer.value)
        context = context.transpose(0, 2, 1, 3).reshape(batch, width, dim)
        states = _normed(_affine(context, layer.attended) + states, layer.attended_norm, self.epsilon)
        widened = _gelu(_affine(states, layer.widen))
        return _normed(_affine(widened, layer.narrow) + states, layer.narrow_norm, self.epsilon)


def open_bert(folder: Path, space: str) -> BertEncoder | None:
    """The encoder of a sentence-transformers folder, or None if the folder asks for anything this file does not do."""
    config = _json(folder / "config.json")
    settings = _json(folder / "sentence_bert_config.json")
    if not _is_plain_bert(config) or not _is_mean_pooled(folder) or not (folder / "tokenizer.json").is_file():
        return None
    try:
        file = open_tensors(folder / "model.safetensors")
    except FormatError:
        return None
    prefix = "bert." if "bert.embeddings.LayerNorm.weight" in file.tensors else ""
    weights = _Weights(file, np.memmap(file.path, np.uint8, "r"), prefix)
    if not weights.complete(config["num_hidden_layers"]):
        return None
    length = settings.get("max_seq_length") or config["max_position_embeddings"]
    return BertEncoder(
        space=space,
        tokenizer=_tokenizer(folder, min(length, config["max_position_embeddings"])),
        words=weights["embeddings.word_embeddings.weight"],
        positions=weights["embeddings.position_embeddings.weight"],
        segment=weights["embeddings.token_type_embeddings.weight"][0],
        embedding_norm=weights.affine("embeddings.LayerNorm"),
        layers=tuple(weights.layer(f"encoder.layer.{index}.") for index in range(config["num_hidden_layers"])),
        heads=config["num_attention_heads"],
        epsilon=config["layer_norm_eps"],
        lowercase=bool(settings.get("do_lower_case")),
    )


@dataclass(frozen=True)
class _Weights:
    file: TensorFile
    data: NDArray[np.uint8]
    prefix: str

    _PARTS = (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
    )  # fmt: skip

    def __getitem__(self, name: str) -> Array:
        info = self.file.tensors[self.prefix + name]
        return np.asarray(self.data[info.start : info.stop]).view("<f4").reshape(info.shape)

    def affine(self, name: str) -> Affine:
        return Affine(self[f"{name}.weight"], self[f"{name}.bias"])

    def layer(self, name: str) -> Layer:
        return Layer(*(self.affine(name + part) for part in self._PARTS))

    def complete(self, layers: int) -> bool:
        """Whether every weight is there, as float32."""
        embeddings = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
        names = [f"embeddings.{part}.weight" for part in embeddings] + ["embeddings.LayerNorm.bias"]
        for index in range(layers):
            names += [f"encoder.layer.{index}.{part}.{kind}" for part in self._PARTS for kind in ("weight", "bias")]
        tensors = self.file.tensors
        return all(self.prefix + name in tensors and tensors[self.prefix + name].dtype == "F32" for name in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_plain_bert(config: dict[str, Any]) -> bool:
    wanted = {"model_type": "bert", "hidden_act": "gelu"}
    sizes = ("num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return (
        all(config.get(key) == value for key, value in wanted.items())
        and config.get("position_embedding_type", "absolute") == "absolute"
        and all(isinstance(config.get(key), int) for key in sizes)
        and isinstance(config.get("layer_norm_eps"), float)
    )


def _is_mean_pooled(folder: Path) -> bool:
    try:
        parts = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [part["type"].rpartition(".")[2] for part in parts]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or parts[0]["path"]:
        return False
    pooling = _json(folder / parts[1]["path"] / "config.json")
    modes = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True}
    return modes == {"pooling_mode_mean_tokens"} or (not modes and pooling.get("pooling_mode") == "mean")


def _tokenizer(folder: Path, length: int) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()  # the file may ask for a fixed width
    tokenizer.enable_truncation(length)
    return tokenizer


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions of texts of about one length, longest first, at most BATCH_TOKENS a batch (or one text)."""
    batch: list[int] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * width > BATCH_TOKENS:
            yield batch
            batch = []
        width = width if batch else lengths[index]
        batch.append(index)
    if batch:
        yield batch


def _affine(states: Array, affine: Affine) -> Array:
    flat = states.reshape(-1, states.shape[-1]) @ affine.weight.T  # one matrix product, not one for each text
    flat += affine.bias
    return flat.reshape(*states.shape[:-1], -1)


def _normed(states: Array, norm: Affine, epsilon: float) -> Array:
    states = states - states.mean(axis=-1, keepdims=True)
    variance = np.einsum("...i,...i->...", states, states)[..., None] / np.float32(states.shape[-1])
    states /= np.sqrt(variance + np.float32(epsilon))
    states *= norm.weight
    states += norm.bias
    return states


def _softmax(scores: Array) -> Array:
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


# Abramowitz & Stegun 7.1.26: erfc(z) = t (a1 + t (a2 + ...)) exp(-z^2), t = 1 / (1 + p z), |error| <= 1.5e-7 for z >= 0
_ERF_P = np.float32(0.3275911)
_ERF_A = tuple(np.float32(a) for a in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))


def _gelu(states: Array) -> Array:
    """x * Phi(x), in place, with the exact error function (not its tanh stand-in)."""
    flat = states.reshape(-1, states.shape[-1])
    for start in range(0, len(flat), GELU_BLOCK):
        block = flat[start : start + GELU_BLOCK]
        size = np.abs(block)
        z = size * np.float32(0.5**0.5)
        t = np.reciprocal(z * _ERF_P + np.float32(1))
        tail = t * _ERF_A[0]
        for a in _ERF_A[1:]:
            tail += a
            tail *= t
        z *= z
        tail *= np.exp(np.negative(z, out=z), out=z)  # erfc(|x| / sqrt 2) = 2 Phi(-|x|)
        tail *= size
        tail *= np.float32(0.5)
        np.maximum(block, np.float32(0), out=block)  # x Phi(x) = max(x, 0) - |x| Phi(-|x|)
        block -= tail
    return states
