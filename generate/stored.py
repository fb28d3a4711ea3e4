"""Fitted generators in files: one safetensors file with one metadata entry. Importing this needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..hub import plugins
from ..hub.errors import BadOption, FormatError, GenerationError
from ..hub.tensorfile import FLOATING, Planned, dtype_name, layout, open_tensors, tensor_bytes, write_tensors
from ..hub.writing import replacing
from .layout import Layout
from .run import Generator
from .taught import Origin, School

LEARNED = f"{__package__}.learned"
SUFFIX = ".safetensors"

_ENTRY = "lorahub_generator"  # the one metadata entry
_VERSION = 1
_DTYPES = ("F32", "F16", "U8")


class Learned(Generator, Protocol):
    """A generator that can be stored: `restore` in the file of its kind takes what these put out."""

    @property
    def kind(self) -> str:
        """The name of its file in `generate/learned`."""
        ...

    @property
    def layout(self) -> Layout: ...

    @property
    def origin(self) -> Origin: ...

    def facts(self) -> dict[str, Any]:
        """Plain data."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """By name; float32, float16 or uint8."""
        ...


def kinds() -> list[str]:
    """The learned generators there are."""
    return plugins.names(LEARNED)


def save(generator: Learned, path: Path, *, force: bool = False) -> Path:
    """Write a generator to one file, which is there in full or not at all; equal generators give equal bytes.

    Raises TargetExists where there is a file and `force` is false, FormatError where the disk refuses.
    """
    said = {
        "version": _VERSION,
        "kind": generator.kind,
        "layout": generator.layout.as_json(),
        "origin": asdict(generator.origin),
        "facts": generator.facts(),
    }
    return write(path, generator.tensors(), {_ENTRY: json.dumps(said, sort_keys=True)}, force=force)


def load(path: Path) -> Learned:
    """Read a saved generator. Raises FormatError, in one line, for a file that is damaged or holds something else."""
    said, tensors = read(path, _ENTRY, "a generator", _VERSION)
    try:
        if said["kind"] not in kinds():
            raise FormatError(f"holds a generator of the unknown kind {said['kind']!r}; expected {', '.join(kinds())}")
        origin = said["origin"]
        if not all(isinstance(origin[name], Mapping) for name in ("library", "told")):
            raise FormatError("does not say from which library it was learned; fit the generator anew")
        known = Origin(str(origin["space"]), dict(origin["library"]), origin["fingerprint"], dict(origin["told"]))
        module = import_module(f"{LEARNED}.{said['kind']}")
        generator: Learned = module.restore(Layout.from_json(said["layout"]), known, said["facts"], tensors)
    except (FormatError, BadOption) as error:
        raise FormatError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FormatError(f"{path}: its description is damaged ({error!r}); fit the generator anew") from None
    return generator


def check_school(generator: Learned, school: School) -> None:
    """Raise GenerationError where a generator cannot serve a library: another structure (named), base or text space."""
    generator.layout.match(school.layout)
    ours, theirs = generator.origin, school
    if ours.space != theirs.space:
        raise GenerationError(
            f"the generator was fitted to descriptions in the space {ours.space!r}, the library's are in "
            f"{theirs.space!r}; open it with the text model of the fit"
        )
    if ours.fingerprint and theirs.fingerprint and ours.fingerprint != theirs.fingerprint:
        raise GenerationError(
            f"the generator was fitted to other weights of {generator.layout.base} (sha256 {ours.fingerprint[:12]}, "
            f"here {theirs.fingerprint[:12]}); fit it anew"
        )


# --- files ----------------------------------------------------------------------------------------------------------


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, force: bool) -> Path:
    """One safetensors file, there in full or not at all."""
    plans = layout(Planned(name, dtype_name(part.dtype), tuple(part.shape)) for name, part in tensors.items())
    with replacing(path, force=force) as place:
        write_tensors(place, plans, (tensor_bytes(tensors[plan.key]) for plan in plans), metadata)
    return path


def read(path: Path, entry: str, what: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata entry of a file, and its tensors. Raises FormatError in one line."""
    file = open_tensors(path)
    if entry not in file.metadata:
        raise FormatError(f"{path}: holds something else than {what} of lorahub")
    try:
        said = json.loads(file.metadata[entry])
    except ValueError:
        said = None
    if not isinstance(said, dict) or not all(isinstance(said.get(part), dict) for part in ("layout", "facts")):
        raise FormatError(f"{path}: its description is damaged; make the file anew")
    if said.get("version") != version:
        raise FormatError(f"{path}: is of version {said.get('version')}, this lorahub reads {version}; make it anew")
    tensors = {}
    for name, info in file.tensors.items():
        if info.dtype not in _DTYPES:
            raise FormatError(f"{path}: {name} is of dtype {info.dtype}; expected {', '.join(_DTYPES)}")
        tensors[name] = file.tensor(name)
        if info.dtype in FLOATING and not bool(torch.isfinite(tensors[name]).all()):
            raise FormatError(f"{path}: {name} holds NaN or Inf; make the file anew")
    return said, tensors
