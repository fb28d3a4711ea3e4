"""The safetensors reader and writer against the safetensors library, and what the reader refuses."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorahub.hub.errors import FormatError
from lorahub.hub.tensorfile import (
    ITEM_SIZES,
    Planned,
    dtype_name,
    has_nonfinite,
    header_bytes,
    layout,
    open_tensors,
    scalar_value,
    tensor_bytes,
    torch_dtype,
    write_tensors,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

DTYPES = {name: torch_dtype(name, Path()) for name in ITEM_SIZES}


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers that every dtype can hold."""
    return (torch.arange(max(1, int(np.prod(shape)))) % 2).reshape(shape).to(dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_reads_as_the_library_reads_it(name: str, tmp_path: Path) -> None:
    tensors = {"a": some(DTYPES[name], 3, 2), "b": some(DTYPES[name], 4), "scalar": some(DTYPES[name])}
    save_file(tensors, tmp_path / "x.safetensors", {"key": "välue"})
    file = open_tensors(tmp_path / "x.safetensors")
    assert file.metadata == {"key": "välue"}
    for key, tensor in load_file(tmp_path / "x.safetensors").items():
        info = file.tensors[key]
        assert (info.dtype, info.shape) == (name, tuple(tensor.shape))
        assert file.raw(key) == tensor_bytes(tensor) == tensor_bytes(file.tensor(key))
        assert dtype_name(tensor.dtype) == name


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp", "Cf"]), min_size=1, max_size=20),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=8,
    ),
    st.dictionaries(st.text(max_size=9), st.text(st.characters(codec="utf-8"), max_size=30), max_size=3),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_what_is_written_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    if "__metadata__" in plan or not plan:
        return
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    metadata = {key: value for key, value in metadata.items() if key.isascii()}
    tensors = {
        key: torch.zeros(shape).to(DTYPES[dtype]) if 0 in shape else some(DTYPES[dtype], *shape)
        for key, (dtype, shape) in plan.items()
    }
    plans = layout(Planned(key, dtype, tuple(shape)) for key, (dtype, shape) in plan.items())
    write_tensors(path, plans, (tensor_bytes(tensors[one.key]) for one in plans), metadata)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
        assert set(file.keys()) == set(tensors)
        for key, tensor in tensors.items():
            back = file.get_tensor(key)
            assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
            assert tensor_bytes(back) == tensor_bytes(tensor)
    again = open_tensors(path)
    assert {key: info.shape for key, info in again.tensors.items()} == {k: tuple(t.shape) for k, t in tensors.items()}
    assert all(info.start % ITEM_SIZES[info.dtype] == 0 for info in again.tensors.values())


def test_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "from lorahub.hub.tensorfile import *; import hashlib;"
        "plans = layout([Planned(k, 'F32', (2,)) for k in set('abcdefg')]);"
        "print(hashlib.sha256(header_bytes(plans, {k: k for k in set('uvwxyz')})).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONHASHSEED": str(seed)}
        ).stdout
        for seed in range(3)
    }
    assert len(found) == 1


def test_no_torch_is_imported_to_read_a_header(tmp_path: Path) -> None:
    save_file({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}, tmp_path / "x.safetensors")
    code = (
        "import sys; from pathlib import Path; from lorahub.hub import reading;"
        "reading.examine(Path(sys.argv[1])); reading.inspect(Path(sys.argv[1]));"
        "header, chunks = reading.canonical(Path(sys.argv[1])); b''.join(chunks); print('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.safetensors")], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


def handmade(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    shape, offsets = (list(one) if isinstance(one, tuple) else one for one in (shape, offsets))
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


REFUSED: dict[str, tuple[Any, bytes, str]] = {
    "cut": ({"a": entry()}, b"1234567", "truncated"),
    "more at the end": ({"a": entry()}, b"123456789", "follow the last tensor"),
    "a hole": ({"a": entry(offsets=(4, 12))}, b"x" * 12, "leaves a hole"),
    "an overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12, "overlaps"),
    "backwards": ({"a": entry(offsets=(8, 0))}, b"x" * 8, "spans -8 bytes"),
    "a shape that lies": ({"a": entry(shape=(3,))}, b"x" * 8, "needs 12"),
    "an unknown dtype": ({"a": entry("F7")}, b"x" * 8, "has dtype 'F7'"),
    "a list for a dtype": ({"a": entry(["F32"])}, b"x" * 8, "has dtype"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8, "lacks"),
    "a negative shape": ({"a": entry(shape=(-2, -1))}, b"x" * 8, "negative"),
    "a fraction": ({"a": entry(shape=(2.0,))}, b"x" * 8, "non-whole"),
    "a truth": ({"a": entry(shape=(True, 2))}, b"x" * 8, "non-whole"),
    "a text for a shape": ({"a": entry(shape="")}, b"x" * 4, "axes"),
    "a table for a shape": ({"a": entry(shape={})}, b"x" * 4, "axes"),
    "a hundred axes": ({"a": entry(shape=(1,) * 100, offsets=(0, 4))}, b"x" * 4, "axes"),
    "a product without end": ({"a": entry(shape=(2**61,) * 300)}, b"x" * 8, "axes"),
    "an empty giant": ({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}, b"", "huge"),
    "one offset": ({"a": entry(offsets=(8,))}, b"x" * 8, "lacks"),
    "an entry that is a list": ({"a": [1]}, b"", "lacks"),
    "an entry that is null": ({"a": None}, b"", "lacks"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "names to strings"),
    "metadata in a list": ({"__metadata__": ["a"]}, b"", "names to strings"),
    "a list": ([], b"", "expected an object"),
    "no JSON": (b"{", b"", "not valid JSON"),
    "another encoding": ("{}".encode("utf-16"), b"", "not valid JSON"),
    "not text": (b"\xff\xfe\xfd", b"", "not valid JSON"),
    "too deep": (b"[" * 100_000, b"", "not valid JSON"),
    "too many digits": (b'{"a":' + b"1" * 5000 + b"}", b"", "not valid JSON"),
    "half a character": (b'{"\\ud800":1}', b"", "not valid JSON"),
    "half a character below": (b'{"__metadata__":{"a":"\\udfff"}}', b"", "not valid JSON"),
    "a key twice": (b'{"a":1,"a":2}', b"", "occurs twice"),
    "a metadata key twice": (b'{"__metadata__":{"a":"1","a":"2"}}', b"", "occurs twice"),
    "a line break in a name": ({"a\nb": entry()}, b"x" * 8, "cannot be a tensor's name"),
    "a terminal's command in a name": ({"a\x1b[2Jb": entry()}, b"x" * 8, "cannot be a tensor's name"),
    "a name that turns round": ({"a\u202eb": entry()}, b"x" * 8, "cannot be a tensor's name"),
    "a name without end": ({"a" * 5000: entry()}, b"x" * 8, "5000 characters"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_damaged_header_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    header, body, words = REFUSED[what]
    path = handmade(tmp_path / "bad.safetensors", header, body)
    with pytest.raises(FormatError) as caught:
        open_tensors(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [0, 1, 3, 2**31, 2**63, 2**64 - 1])
def test_a_length_that_lies(length: int, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        open_tensors(handmade(tmp_path / "bad.safetensors", {"a": entry()}, b"x" * 8, length))


@pytest.mark.parametrize("data", [b"", b"1234567", b'{"a": {"shape": [4], "fakeTensor": true}}', b"\n {}         "])
def test_what_is_no_safetensors_file_at_all(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match=r"empty or truncated|is a JSON text|header claims"):
        open_tensors(tmp_path / "bad.safetensors")


def test_places_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "loop", tmp_path / ("n" * 300), Path("/dev/zero")):
        with pytest.raises(FormatError, match=r"no regular file|cannot be read"):
            open_tensors(path)


def test_it_is_as_strict_as_the_library(tmp_path: Path) -> None:
    """Whatever the library refuses is refused here too."""
    for what, (header, body, _) in REFUSED.items():
        path = handmade(tmp_path / "bad.safetensors", header, body)
        try:
            with safe_open(path, "pt"):
                continue
        except (SafetensorError, OverflowError):
            pass
        with pytest.raises(FormatError):
            open_tensors(path)
        assert what


@pytest.mark.parametrize(
    ("name", "value"),
    [("F32", 1.5), ("F64", -0.25), ("F16", 2.0), ("BF16", 3.0), ("I8", -4), ("U8", 200), ("I32", 7), ("I64", -9)],
)
def test_scalars_without_torch(name: str, value: float, tmp_path: Path) -> None:
    for shape in ((), (1,), (1, 1, 1)):
        save_file({"x": torch.full(shape, value, dtype=DTYPES[name])}, tmp_path / "x.safetensors")
        assert open_tensors(tmp_path / "x.safetensors").scalar("x") == value


def test_a_scalar_of_several_numbers_is_refused(tmp_path: Path) -> None:
    tensors = {"two": torch.ones(2), "none": torch.ones(0), "truth": torch.ones(1, dtype=torch.bool)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = open_tensors(tmp_path / "x.safetensors")
    for key in tensors:
        with pytest.raises(FormatError, match="expected a"):
            file.scalar(key)
    info = file.tensors["truth"]
    with pytest.raises(FormatError, match="here has dtype BOOL"):
        scalar_value(info, b"\1", "here")


@pytest.mark.parametrize("name", ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"])
def test_nan_and_inf_are_seen_in_the_bytes(name: str) -> None:
    dtype = DTYPES[name]
    for sign in (1, -1):
        largest = torch.full((5,), sign * torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
        assert not has_nonfinite(name, tensor_bytes(largest))
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoilt = torch.tensor([1.0, bad, 2.0]).to(dtype)
        expected = not bool(torch.isfinite(spoilt.float()).all())
        assert has_nonfinite(name, tensor_bytes(spoilt)) is expected
    assert not has_nonfinite("I32", b"\xff" * 8)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(100)}, tmp_path / "x.safetensors")
    file = open_tensors(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as stream:
        stream.truncate(120)
    with pytest.raises(FormatError, match="ends early"):
        file.raw("x")


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be written"):
        write_tensors(tmp_path / "missing" / "x", [], [], {})
    header = header_bytes([Planned("a", "F32", (2,))], {})
    assert (len(header) - 8) % 8 == 0
