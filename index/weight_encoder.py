"""A fitted weight encoder, frozen: adapters in, vectors among those of words out. Torch is loaded when it encodes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from ..hub.bases import same_base
from ..hub.errors import BadOption, FormatError
from ..hub.plugins import check_options
from ..hub.tensorfile import Planned, TensorFile, layout, open_tensors, write_tensors
from .calibration import Calibration
from .crowding import crowding
from .modules import Manifest

if TYPE_CHECKING:
    from ..hub.adapter import Adapter

KINDS = {"autolora": ".encoders.autolora", "w2t": ".encoders.w2t", "ridge": ".ridge"}  # kind -> module with its builder
SHIPPED = Path(__file__).parent / "shipped"
SUFFIX = ".safetensors"

_ENTRY = "lorahub_weight_encoder"  # the one metadata entry
_VERSION = 2
_LANDMARKS = "landmarks"
_UNMEASURED = Calibration()
_TYPES: dict[str, Any] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


def builder(kind: str) -> Callable[..., Any]:
    """The function that makes a kind's network. Raises BadOption for a kind that is none; imports torch."""
    if kind not in KINDS:
        raise BadOption(f"there is no weight encoder {kind!r}; expected one of {', '.join(KINDS)}")
    function: Callable[..., Any] = getattr(import_module(KINDS[kind], __package__), kind)
    return function


@dataclass(frozen=True, eq=False)
class WeightEncoder:
    """Adapters of one base -> unit vectors (dim,) in the space of a text encoder.

    kind, options: which network, and how it was built. tensors: what it learned, float16 or float32. texts: the name of
    the text encoder's space. told: figures of the fit, plain data. calibration: cosine -> how often the nearest words
    were right; neighbours: the same for the nearest adapter; queries: how often an adapter of such a score was what
    words meant, nearest or not, by `scores`. landmarks: float16 (m, dim), where the words lie that it was fitted to.
    """

    kind: str
    manifest: Manifest
    dim: int
    texts: str
    tensors: Mapping[str, NDArray[Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration = _UNMEASURED
    neighbours: Calibration = _UNMEASURED
    queries: Calibration = _UNMEASURED
    landmarks: NDArray[np.float16] = field(default_factory=lambda: np.empty((0, 0), np.float16), repr=False)

    @property
    def base(self) -> str | None:
        return self.manifest.base

    @cached_property
    def space(self) -> str:
        """The name of its vector space: it changes with everything that changes a vector."""
        said = [self.kind, self.manifest.as_json(), self.dim, self.texts, dict(self.options)]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for name in sorted(self.tensors):
            array = self.tensors[name]
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return f"weights:{self.kind}:{digest.hexdigest()[:12]}"

    def encode(self, adapter: Adapter) -> NDArray[np.float32]:
        """The adapter's unit vector (dim,). Raises IncompatibleAdapters as `Manifest.check` does."""
        vector: NDArray[np.float32] = self.encode_all([adapter])[0]
        return vector

    def encode_all(self, adapters: Iterable[Adapter], batch: int = 64) -> NDArray[np.float32]:
        """Unit vectors (n, dim); at most `batch` adapters are held at once.

        Raises IncompatibleAdapters as `Manifest.check` does.
        """
        import torch

        source, vectors = iter(adapters), [np.empty((0, self.dim), np.float32)]
        network = self._network
        with torch.inference_mode():
            while items := [network.features(adapter) for adapter in islice(source, batch)]:
                vectors.append(network(items).numpy().astype(np.float32, copy=False))
        return np.concatenate(vectors)

    def crowding(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """What cosines of words with adapters' unit vectors (n, dim) are lowered by (n,); see `crowding`."""
        return crowding(vectors, self.landmarks)

    def scores(self, queries: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """How well adapters (n, dim) fit words (q, dim), both unit vectors: (q, n), cosines less the crowding."""
        return queries @ vectors.T - self.crowding(vectors)

    def confidence(self, cosine: float, *, of: str = "words") -> float:
        """How often the nearest words ("words") or the nearest adapter ("adapters") were right at such a cosine, or an
        adapter of such a score was what words asked for ("queries").

        Measured on adapters that the fit had not seen; 0.0 if there were none.
        """
        known = {"words": self.calibration, "adapters": self.neighbours, "queries": self.queries}
        if of not in known:
            raise BadOption(f"there is no confidence of {of!r}; expected {', '.join(known)}")
        return known[of](cosine)

    def save(self, path: Path) -> None:
        """Write one safetensors file, which is there in full or not at all. Raises FormatError if the disk refuses."""
        from ..hub.writing import replacing

        names = {np.dtype("<f2"): "F16", np.dtype("<f4"): "F32"}
        held = {**self.tensors, _LANDMARKS: self.landmarks}
        plans = layout(Planned(name, names[array.dtype], array.shape) for name, array in held.items())
        chunks = (np.ascontiguousarray(held[plan.key]).tobytes() for plan in plans)
        said = {
            "version": _VERSION, "kind": self.kind, "manifest": self.manifest.as_json(), "dim": self.dim,
            "texts": self.texts, "options": dict(self.options), "told": dict(self.told),
            "calibration": self.calibration.as_json(), "neighbours": self.neighbours.as_json(),
            "queries": self.queries.as_json(),
        }  # fmt: skip
        with replacing(path, force=True) as place:
            write_tensors(place, plans, chunks, {_ENTRY: json.dumps(said, sort_keys=True)})

    @cached_property
    def _network(self) -> Any:
        import torch

        build = builder(self.kind)
        options = check_options(build, dict(self.options))
        with torch.random.fork_rng(devices=[]):  # a fresh network's weights are drawn, and then replaced
            network = build(self.manifest, dim=self.dim, **options)
        state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in self.tensors.items()}
        wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
        if wanted != {name: tensor.shape for name, tensor in state.items()}:
            raise FormatError(f"the tensors of {self.space} are not those of its description; fit or fetch it anew")
        network.load_state_dict(state)
        return network.eval().requires_grad_(False)


def frozen(state: Mapping[str, Any], *, half: bool = True) -> dict[str, NDArray[Any]]:
    """A network's state as the encoder keeps it: float16 where `half`, so that what is saved is what is used.

    Raises FormatError for a number that is not finite there.
    """
    kind = np.dtype("<f2") if half else np.dtype("<f4")
    with np.errstate(over="ignore"):
        found = {name: np.ascontiguousarray(tensor.detach().numpy().astype(kind)) for name, tensor in state.items()}
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise FormatError(f"{name} is not finite in {array.dtype}; fit again with a smaller rate")
    return found


def load_encoder(path: Path) -> WeightEncoder:
    """Read a saved encoder, without torch. Raises FormatError, in one line, for a file that is damaged or another's."""
    file = open_tensors(path)
    if _ENTRY not in file.metadata:
        raise FormatError(f"{path}: is no weight encoder; expected a file that `lorahub encoder fit` wrote")
    try:
        said = json.loads(file.metadata[_ENTRY])
        if said["version"] != _VERSION:
            raise FormatError(f"is of version {said['version']}, this lorahub reads {_VERSION}; fit the encoder anew")
        if said["kind"] not in KINDS:
            raise FormatError(f"is an encoder of the unknown kind {said['kind']!r}; expected {', '.join(KINDS)}")
        held = {name: _array(file, name) for name in file.tensors}
        places, dim = held.pop(_LANDMARKS), int(said["dim"])
        if places.size and places.shape[1:] != (dim,):
            raise FormatError(f"its landmarks have shape {places.shape}; expected rows of {dim}: fit the encoder anew")
        return WeightEncoder(
            kind=said["kind"],
            manifest=Manifest.from_json(said["manifest"]),
            dim=dim,
            texts=str(said["texts"]),
            tensors=held,
            landmarks=places,
            options=dict(said["options"]),
            told=dict(said["told"]),
            calibration=Calibration.from_json(said["calibration"]),
            neighbours=Calibration.from_json(said["neighbours"]),
            queries=Calibration.from_json(said["queries"]),
        )
    except FormatError as error:
        message = str(error)
        raise FormatError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: its description is damaged ({error!r}); fit or fetch the encoder anew") from None


def encoder_path(home: Path, base: str) -> Path:
    """Where the user's own encoder for a base lies, if there is one."""
    return home / "encoders" / (quote(base, safe="") + SUFFIX)


def shipped_encoders() -> dict[str, Path]:
    """The encoders that come with lorahub: base -> file."""
    return _encoders(SHIPPED)


def encoder_for(home: Path, base: str | None) -> WeightEncoder | None:
    """The encoder for a base, None if there is none: the user's own before a shipped one, the very name before another
    of its family. For an unknown base, the only encoder there is, if there is just one.

    Raises FormatError if its file is damaged.
    """
    own, shipped = _encoders(home / "encoders"), shipped_encoders()
    if base is None:
        every = {**shipped, **own}
        return load_encoder(next(iter(every.values()))) if len(every) == 1 else None
    for known in (own, shipped):
        fitting = [known[base]] if base in known else [path for name, path in known.items() if same_base(name, base)]
        if fitting:
            return load_encoder(fitting[0])
    return None


def _encoders(folder: Path) -> dict[str, Path]:
    return {unquote(path.name.removesuffix(SUFFIX)): path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def _array(file: TensorFile, name: str) -> NDArray[Any]:
    info = file.tensors[name]
    if info.dtype not in _TYPES:
        raise FormatError(f"{file.path}: {name} is of dtype {info.dtype}; expected F16 or F32")
    data = file.raw(name)
    if file.nonfinite(name, data):
        raise FormatError(f"{file.path}: {name} holds NaN or Inf; fit or fetch the encoder anew")
    return np.frombuffer(data, _TYPES[info.dtype]).reshape(info.shape)
