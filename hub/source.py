"""Source: an adapter as it lies on disk, opened but not yet interpreted.

A PEFT or MLX directory, a single safetensors file, a canonical blob and (with consent) a pickle all become the same
thing: named tensors, header metadata and, where there is one, the adapter's configuration.
"""

from __future__ import annotations

import json
import os
import struct
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import FormatError, UnsafeFile
from .tensorfile import (
    ITEM_SIZES,
    TensorFile,
    TensorInfo,
    check_name,
    dtype_name,
    file_size,
    has_nonfinite,
    open_tensors,
    scalar_value,
    shown,
    tensor_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
WEIGHT_FILES = ("adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin")
CONFIG_FILE = "adapter_config.json"
CANONICAL_KEY = "lorahub.source"  # the one metadata entry of a canonical blob
_CONFIG_LIMIT = 16 * 1024 * 1024  # bytes; a larger configuration is none


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
    """An opened adapter. `path` is what the user named, `weights` the file with the tensors.

    `memo` is for what a dialect works out once a file.
    """

    path: Path
    weights: Path
    file: Tensors
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.file.tensors


@dataclass(frozen=True)
class UnpickledTensors:
    """The tensors of a pickle that the caller consented to load."""

    path: Path
    values: Mapping[str, Tensor]

    @cached_property
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
        return scalar_value(self.tensors[key], self.raw(key), f"{self.path}: {shown(key)}")

    def nonfinite(self, key: str, data: bytes) -> bool:
        return has_nonfinite(dtype_name(self.values[key].dtype), data)


def weight_file(folder: Path) -> Path | None:
    """The file that holds the tensors of a PEFT or MLX directory; safetensors before a pickle."""
    return next((folder / name for name in WEIGHT_FILES if _is_file(folder / name)), None)


def open_source(path: Path, *, allow_pickle: bool = False) -> Source:
    """Open a file or a PEFT/MLX directory.

    Raises FormatError if it is damaged or no adapter, UnsafeFile if it is a pickle and `allow_pickle` is false.
    """
    weights = path
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        found = weight_file(path)
        if found is None:
            raise FormatError(f"{path}: holds none of {', '.join(WEIGHT_FILES)}; name an adapter file or a PEFT folder")
        weights = found
    file_size(weights)
    config = _config_beside(weights)
    if weights.suffix.lower() in PICKLES:
        return Source(path, weights, _unpickle(weights, allow_pickle), {}, config)
    if weights.suffix.lower() == ".gguf":
        raise FormatError(f"{path}: is a GGUF file, which lorahub does not read; use the adapter it was converted from")
    file = open_tensors(weights)
    if CANONICAL_KEY in file.metadata:
        return _canonical(path, weights, file)
    return Source(path, weights, file, file.metadata, config)


def _canonical(path: Path, weights: Path, file: TensorFile) -> Source:
    origin = _parse_json(weights, file.metadata[CANONICAL_KEY])
    metadata, config = origin.get("metadata") or {}, origin.get("config")
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not texts or not isinstance(config, (dict, type(None))):
        raise FormatError(f"{weights}: its {CANONICAL_KEY} is not what lorahub writes; fetch the file again")
    return Source(path, weights, file, metadata, config)


def _is_file(path: Path) -> bool:
    """As os.path.isfile, which unlike Path.is_file takes a folder that may not be entered for one without files."""
    return os.path.isfile(path)  # noqa: PTH113


def origin_json(source: Source) -> str:
    """What a canonical blob keeps of the source beside the tensors, as sorted JSON."""
    return json.dumps({"config": source.config, "metadata": dict(source.metadata)}, sort_keys=True)


def _config_beside(weights: Path) -> Mapping[str, Any] | None:
    file = weights.parent / CONFIG_FILE
    if weights.name not in WEIGHT_FILES or not _is_file(file):
        return None
    try:
        with file.open("rb") as stream:
            data = stream.read(_CONFIG_LIMIT + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file}: cannot be read as text ({error}); restore it from the adapter's origin") from None
    if len(data) > _CONFIG_LIMIT:
        raise FormatError(f"{file}: has more than {_CONFIG_LIMIT} bytes, which no adapter's configuration has")
    return _parse_json(file, text)


def _parse_json(path: Path, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # halves of characters can be neither stored nor shown
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

    # a damaged pickle is a damaged program: it fails in the unpickler with whatever its last instruction ran into
    program = (pickle.UnpicklingError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)
    file = (OSError, EOFError, ValueError, RuntimeError, ImportError, MemoryError, struct.error, tarfile.TarError)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (*program, *file) as error:
        reason = (str(error).splitlines() or [""])[0][:100] or type(error).__name__
        raise FormatError(
            f"{path}: cannot be loaded with weights_only=True ({shown(reason)}); it is damaged or unsafe"
        ) from None
    return UnpickledTensors(path, _flat(path, loaded))


def _flat(path: Path, loaded: object) -> dict[str, Tensor]:
    import torch

    if isinstance(loaded, (list, tuple)) and loaded and all(isinstance(item, torch.Tensor) for item in loaded):
        loaded = {f"list:{index}": item for index, item in enumerate(loaded)}
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise FormatError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary or list of tensors")
    return {str(key): _plain(path, str(key), value) for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def _plain(path: Path, key: str, value: Tensor) -> Tensor:
    """The tensor, if safetensors could hold it too. Raises FormatError for what only a pickle can say."""
    import torch

    where = f"{path}: {check_name(path, key)}"
    dense = value.layout == torch.strided and value.device.type == "cpu"
    if not dense or dtype_name(value.dtype) not in ITEM_SIZES:
        raise FormatError(f"{where} is no plain tensor ({value.dtype}, {value.layout}, {value.device})")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise FormatError(f"{where} is larger than its bytes: an expanded tensor; save a copy of it")
    return value.detach()
