"""Safetensors files: a strict, torch-free reader of headers and bytes, and a streaming writer.

The header is checked in full before a byte of a tensor is used: a damaged or hostile file is refused in one line.
No handle is kept open: a tensor is read with one seek when it is asked for.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import FormatError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEADER_LIMIT = 100 * 1024 * 1024  # bytes; the limit of the safetensors library itself
_AXES_LIMIT = 16  # axes of a tensor; adapters have at most five
_COUNT_LIMIT = 2**62  # numbers in a shape and offsets
_NAME_LIMIT = 1000  # characters of a tensor's name
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # rules a terminal, breaks a line

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip

FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}

# dtype -> (unsigned view, mask of the exponent): all exponent bits set means Inf or NaN
_EXPONENTS: dict[str, tuple[str, int]] = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
    "F8_E5M2": ("u1", 0x7C),
}


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the header; offsets are absolute positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file, and its bytes on request."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def raw(self, key: str) -> bytes:
        """The tensor's bytes, little-endian, in C order."""
        info = self.tensors[key]
        with self.path.open("rb") as file:
            file.seek(info.start)
            data = file.read(info.stop - info.start)
        if len(data) != info.stop - info.start:
            raise FormatError(f"{self.path}: {shown(key)} ends early; the file was cut while it was read: try again")
        return data

    def tensor(self, key: str) -> Tensor:
        """The tensor, in its stored dtype. Raises FormatError for a dtype that torch lacks."""
        import torch

        info = self.tensors[key]
        data = bytearray(self.raw(key))
        dtype = torch_dtype(info.dtype, self.path)
        if not data:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(info.shape)

    def scalar(self, key: str) -> float:
        """A tensor of one element as a float, without torch."""
        info = self.tensors[key]
        return scalar_value(info, self.raw(key), f"{self.path}: {shown(key)}")

    def nonfinite(self, key: str, data: bytes) -> bool:
        """Whether `data`, the tensor's bytes, holds a NaN or an infinity."""
        return has_nonfinite(self.tensors[key].dtype, data)


def torch_dtype(name: str, path: Path) -> torch.dtype:
    """torch's dtype for a safetensors dtype name. Raises FormatError if there is none."""
    import torch

    names = {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
        "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32",
        "F32": "float32", "F64": "float64", "I64": "int64", "U64": "uint64",
    }  # fmt: skip
    found = getattr(torch, names[name], None)
    if found is None:
        raise FormatError(f"{path}: tensors of dtype {name} need a newer torch than {torch.__version__}")
    return found  # type: ignore[no-any-return]


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    word = str(dtype).removeprefix("torch.")
    special = {"bfloat16": "BF16", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    return special.get(word) or word.replace("float", "F").replace("uint", "U").replace("int", "I")


def shown(name: str) -> str:
    """A name from a file as an error message shows it: quoted, on one line, not longer than a line."""
    return repr(name) if len(name) <= 120 else f"{name[:100]!r}... ({len(name)} characters)"


def check_name(path: Path, key: str) -> str:
    """The tensor's name as messages show it. Raises FormatError for control characters and endless names."""
    if len(key) > _NAME_LIMIT or _CONTROL.search(key):
        raise FormatError(f"{path}: {shown(key)} cannot be a tensor's name; the file is damaged")
    return shown(key)


def scalar_value(info: TensorInfo, data: bytes, where: str) -> float:
    """The one number in `data`. Raises FormatError for several, and for a dtype that is no number."""
    codes = {
        "F16": "<e", "F32": "<f", "F64": "<d", "I8": "<b", "U8": "<B", "I16": "<h", "U16": "<H", "I32": "<i",
        "U32": "<I", "I64": "<q", "U64": "<Q",
    }  # fmt: skip
    if math.prod(info.shape) != 1:
        raise FormatError(f"{where} has shape {list(info.shape)}, expected a single number")
    if info.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if info.dtype not in codes:
        raise FormatError(f"{where} has dtype {info.dtype}, expected a number")
    return float(struct.unpack(codes[info.dtype], data)[0])


def has_nonfinite(dtype: str, data: bytes) -> bool:
    """Whether the bytes of a tensor of `dtype` hold a NaN or an infinity."""
    if dtype == "F8_E4M3":
        return bool(((np.frombuffer(data, "u1") & 0x7F) == 0x7F).any())
    view = _EXPONENTS.get(dtype)
    if view is None:
        return False
    code, mask = view
    return bool(((np.frombuffer(data, code) & mask) == mask).any())


def open_tensors(path: Path) -> TensorFile:
    """Parse and check a safetensors header. Raises FormatError, in one line, for anything that is not right."""
    size = file_size(path)
    try:
        with path.open("rb") as file:
            return _parse(path, size, file.read(8), file.read)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None


def file_size(path: Path) -> int:
    """Size in bytes. Raises FormatError for what is missing or no regular file: to open a pipe would wait for ever."""
    try:
        found = path.stat()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); check that it exists and is a file") from None
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path}: is no regular file; name an adapter file or a PEFT folder")
    return found.st_size


def _parse(path: Path, size: int, prefix: bytes, read: Any) -> TensorFile:
    if len(prefix) < 8:
        raise FormatError(f"{path}: has {size} bytes, a safetensors file has at least 8: it is empty or truncated")
    length = struct.unpack("<Q", prefix)[0]
    if length > min(HEADER_LIMIT, size - 8):
        if prefix.lstrip().startswith(b"{"):
            raise FormatError(f"{path}: is a JSON text (a header dump?), not tensors; fetch the file itself")
        raise FormatError(
            f"{path}: its header claims {length} bytes in a file of {size}: truncated, or not a safetensors file"
        )
    try:
        text = read(length)
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        if (
            b"\\u" in text
        ):  # halves of characters, which break every later use of a name, can be written as escapes only
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: its header is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: its header is a {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map names to strings; the header is damaged")
    start = 8 + length
    tensors = {key: _entry(path, key, entry, start, size) for key, entry in header.items()}
    _check_layout(path, tensors, start, size)
    return TensorFile(path, tensors, metadata)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _entry(path: Path, key: str, entry: Any, start: int, size: int) -> TensorInfo:
    where = f"{path}: {check_name(path, key)}"
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise FormatError(f"{where} lacks a dtype, a shape or two data_offsets: damaged header") from None
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise FormatError(f"{where} has dtype {shown(str(dtype))}, expected one of {', '.join(ITEM_SIZES)}")
    if not isinstance(shape, list) or len(shape) > _AXES_LIMIT:
        raise FormatError(f"{where} has no shape of at most {_AXES_LIMIT} axes: damaged header")
    if not all(type(count) is int and 0 <= count < _COUNT_LIMIT for count in (*shape, first, last)):
        raise FormatError(f"{where} has a negative, huge or non-whole shape or offset: damaged header")
    expected = math.prod(shape) * ITEM_SIZES[dtype]
    if last - first != expected:
        raise FormatError(f"{where} spans {last - first} bytes, its {dtype} {shape} needs {expected}: damaged header")
    if math.prod(filter(None, shape)) >= _COUNT_LIMIT:
        raise FormatError(f"{where} is empty and yet of a huge shape {shape}: damaged header")
    if start + last > size:
        raise FormatError(f"{where} ends at byte {start + last} of a file of {size}: truncated")
    return TensorInfo(dtype, tuple(shape), start + first, start + last)


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    end = start
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            what = "overlaps another tensor" if info.start < end else "leaves a hole before it"
            raise FormatError(f"{path}: {shown(key)} {what}: damaged header")
        end = info.stop
    if end != size:
        raise FormatError(f"{path}: {size - end} bytes follow the last tensor: damaged, or not written to the end")


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its header entry before its bytes are made."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def layout(plans: Iterable[Planned]) -> list[Planned]:
    """The order on disk: wider dtypes first, so that every tensor is aligned, then by name."""
    return sorted(plans, key=lambda plan: (-ITEM_SIZES[plan.dtype], plan.key))


def header_bytes(plans: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and header for tensors in the order of `plans`, padded with spaces to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for plan in plans:
        header[plan.key] = {
            "dtype": plan.dtype,
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.nbytes],
        }
        offset += plan.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensors(path: Path, plans: Sequence[Planned], chunks: Iterable[bytes], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in one pass; `chunks` yields each planned tensor's bytes in the order of `plans`.

    The bytes are on the disk when this returns. Raises FormatError naming the file when the disk refuses.
    """
    try:
        with path.open("wb") as file:
            file.write(header_bytes(plans, metadata))
            for plan, data in zip(plans, chunks, strict=True):
                if len(data) != plan.nbytes:
                    raise AssertionError(f"{plan.key}: {len(data)} bytes made, {plan.nbytes} planned")
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FormatError(f"{path}: cannot be written ({error.strerror}); free space or choose another place") from None


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes, little-endian, in C order."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
