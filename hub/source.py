"""Source: an adapter as it lies on disk, opened but not yet interpreted.

A PEFT or MLX directory, a single safetensors file, a canonical blob and (with consent) a pickle all become the same
thing: named tensors, header metadata and, where there is one, the adapter's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import FormatError, UnsafeFile
from .tensorfile import TensorInfo, dtype_name, has_nonfinite, open_tensors, scalar_value, tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
WEIGHT_FILES = ("adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin")
CONFIG_FILE = "adapter_config.json"
CANONICAL_KEY = "lorahub.source"  # the one metadata entry of a canonical blob


class Tensors(Protocol):
    """Named tensors of a file: safetensors or an unpickled dictionary."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def raw(self, key: str) -> bytes: ...
    def tensor(self, key: str) -> Tensor: ...
    def scalar(self, key: str) -> float: ...
    def nonfinite(self, key: str, data: bytes) -> bool: ...


@dataclass(frozen=True)
class Source:
    """An opened adapter. `path` is what the user named, `weights` the file with the tensors."""

    path: Path
    weights: Path
    file: Tensors
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.file.tensors


@dataclass(frozen=True)
class UnpickledTensors:
    """The tensors of a pickle that the caller consented to load."""

    path: Path
    values: Mapping[str, Tensor]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            key: TensorInfo(dtype_name(value.dtype), tuple(value.shape), 0, value.numel() * value.element_size())
            for key, value in self.values.items()
        }

    def raw(self, key: str) -> bytes:
        return tensor_bytes(self.values[key])

    def tensor(self, key: str) -> Tensor:
        return self.values[key]

    def scalar(self, key: str) -> float:
        return scalar_value(dtype_name(self.values[key].dtype), self.raw(key), f"{self.path}: {key}")

    def nonfinite(self, key: str, data: bytes) -> bool:
        return has_nonfinite(dtype_name(self.values[key].dtype), data)


def weight_file(folder: Path) -> Path | None:
    """The file that holds the tensors of a PEFT or MLX directory; safetensors before a pickle."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def open_source(path: Path, *, allow_pickle: bool = False) -> Source:
    """Open a file or a PEFT/MLX directory.

    Raises FormatError if it is damaged or no adapter, UnsafeFile if it is a pickle and `allow_pickle` is false.
    """
    weights = path
    if path.is_dir():
        found = weight_file(path)
        if found is None:
            raise FormatError(f"{path}: holds none of {', '.join(WEIGHT_FILES)}; name an adapter file or a PEFT folder")
        weights = found
    config = _config_beside(weights)
    if weights.suffix.lower() in PICKLES:
        return Source(path, weights, _unpickle(weights, allow_pickle), {}, config)
    if weights.suffix.lower() == ".gguf":
        raise FormatError(f"{path}: is a GGUF file, which lorahub does not read; use the adapter it was converted from")
    file = open_tensors(weights)
    if CANONICAL_KEY in file.metadata:
        origin = _parse_json(weights, file.metadata[CANONICAL_KEY])
        return Source(path, weights, file, origin.get("metadata") or {}, origin.get("config"))
    return Source(path, weights, file, file.metadata, config)


def origin_json(source: Source) -> str:
    """What a canonical blob keeps of the source beside the tensors, as sorted JSON."""
    return json.dumps({"config": source.config, "metadata": dict(source.metadata)}, sort_keys=True)


def _config_beside(weights: Path) -> Mapping[str, Any] | None:
    file = weights.parent / CONFIG_FILE
    if weights.name not in WEIGHT_FILES or not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file}: cannot be read as text ({error}); restore it from the adapter's origin") from None
    return _parse_json(file, text)


def _parse_json(path: Path, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not valid JSON ({error}); restore it from the adapter's origin") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def _unpickle(path: Path, allow_pickle: bool) -> UnpickledTensors:
    if not allow_pickle:
        raise UnsafeFile(
            f"{path}: is a pickle, and loading a pickle can run code; "
            "if you trust its origin add --allow-pickle (it is then loaded with weights_only=True)"
        )
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise FormatError(
            f"{path}: cannot be loaded with weights_only=True ({reason}); it is damaged or unsafe"
        ) from None
    return UnpickledTensors(path, _flat(path, loaded))


def _flat(path: Path, loaded: object) -> dict[str, Tensor]:
    import torch

    if isinstance(loaded, (list, tuple)) and loaded and all(isinstance(item, torch.Tensor) for item in loaded):
        return {f"list:{index}": item for index, item in enumerate(loaded)}
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise FormatError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary or list of tensors")
    return {str(key): value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
