"""Writing adapters: every module with scale 1, in one pass, and never a half-written file.

A writer works in a temporary neighbour of the target, which takes the target's place when all bytes are on the disk.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .adapter import Adapter, LazyModules
from .bases import pointwise
from .errors import FormatError, IncompatibleAdapters, TargetExists, UnknownMethod
from .plugins import names
from .tensorfile import Planned, dtype_name, layout, tensor_bytes, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from .lowrank import LowRank

FORMATS = f"{__package__}.formats"
FILE_NAMES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "lora.safetensors"}


@dataclass(frozen=True)
class Piece:
    """A factor on its way to a file: the tensor's name there, the module and side it comes from, the shape to take."""

    key: str
    module: str
    side: str  # "up" or "down"
    shape: tuple[int, ...]


def formats() -> list[str]:
    """The dialects that can be written."""
    return [name for name in names(FORMATS) if hasattr(import_module(f"{FORMATS}.{name}"), "write")]


def target_file(out: Path, to: str) -> Path:
    """Where a dialect's weights go: PEFT fills the folder `out`; others a file, inside `out` unless it names one."""
    if to == "peft" or out.suffix == ".safetensors":
        return out
    return out / FILE_NAMES.get(to, "adapter.safetensors")


def ready(adapter: Adapter, dtype: torch.dtype | None = None) -> Adapter:
    """The adapter as it will be stored: scale 1, cast to `dtype` (None: as it is), each factor checked to be finite.

    Stays lazy. Reading a module raises FormatError where the cast overflows.
    """
    source = adapter.modules

    def load(name: str) -> LowRank:
        module = source[name]
        folded = module.folded().to(dtype or module.dtype)
        for side in (folded.up, folded.down):
            if not bool(torch.isfinite(side).all()):
                raise FormatError(
                    f"{adapter.name}: {name} holds NaN or Inf in {dtype_name(folded.dtype)}; "
                    "store a wider type (--dtype float32) or check the inputs"
                )
        return folded

    meta = {**adapter.meta, "dtype": dtype} if dtype else adapter.meta
    return replace(adapter, modules=LazyModules(adapter.shapes, load), meta=meta)


def save(
    adapter: Adapter,
    out: Path,
    to: str = "peft",
    *,
    force: bool = False,
    card: Callable[[], str] | None = None,
) -> Path:
    """Write an adapter as dialect `to`; returns the path that reads back as the same adapter.

    `card` makes the model card once all modules are written: README.md in a folder, `<stem>.md` beside a single file.
    Raises TargetExists, UnknownMethod for a dialect that cannot be written, IncompatibleAdapters for one that cannot
    hold this adapter.
    """
    if to not in formats():
        raise UnknownMethod(f"cannot write {to!r}; expected one of {', '.join(formats())}")
    file = target_file(out, to)
    alone = file == out and to != "peft"
    if not adapter.shapes:
        raise IncompatibleAdapters(f"{adapter.name}: has no modules to write")
    adapter = with_pointwise(adapter)
    with replacing(out, force=force) as place:
        weights = place if alone or to == "peft" else place / file.name
        if not alone:
            place.mkdir(parents=True, exist_ok=True)
        import_module(f"{FORMATS}.{to}").write(adapter, weights)
        if card and not alone:
            (place / "README.md").write_text(card(), encoding="utf-8")
    if card and alone:
        out.with_suffix(".md").write_text(card(), encoding="utf-8")
    return file


def with_pointwise(adapter: Adapter) -> Adapter:
    """The adapter, with linear maps that its base has as 1x1 convolutions in that shape: loaders insist on it."""
    source, shapes = adapter.modules, dict(adapter.shapes)
    convolutions = {n for n, shape in shapes.items() if not shape.kernel and pointwise(n, adapter.base)}
    if not convolutions:
        return adapter
    shapes |= {name: replace(shapes[name], kernel=(1, 1)) for name in convolutions}

    def load(name: str) -> LowRank:
        return replace(source[name], kernel=(1, 1)) if name in convolutions else source[name]

    return replace(adapter, modules=LazyModules(shapes, load))


@contextmanager
def replacing(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary path beside `out` that takes its place when the block ends well, and vanishes when it does not.

    Raises TargetExists before any work where `out` exists and `force` is false.
    """
    if out.exists() and not force:
        raise TargetExists(f"{out}: exists already; choose another --out, or --force to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise FormatError(f"{out}: cannot be created ({error.strerror}); choose another --out") from None
    try:
        place = room / out.name
        yield place
        _swap(place, out, room / "replaced")
    except OSError as error:
        raise FormatError(f"{out}: cannot be written ({error.strerror}); free space or choose another --out") from None
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _swap(new: Path, out: Path, old: Path) -> None:
    if out.is_dir() and not out.is_symlink():
        out.replace(old)  # a folder cannot be replaced in one step: move it aside, put it back on failure
        try:
            new.replace(out)
        except OSError:
            old.replace(out)
            raise
    else:
        new.replace(out)


def store(
    path: Path,
    adapter: Adapter,
    pieces: Sequence[Piece],
    extras: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Stream pieces of the adapter's modules and `extras` into one safetensors file. For the dialects' writers.

    A module is read once, when its first factor is due, and let go after its second.
    """
    clash = {piece.key for piece in pieces} & set(extras)
    if clash:
        raise IncompatibleAdapters(f"{adapter.name}: {sorted(clash)[0]} is both a factor and an extra tensor")
    dtypes = _stored_dtypes(adapter)
    by_key = {piece.key: piece for piece in pieces}
    plans = layout(
        [
            *(Planned(piece.key, dtypes[piece.module], piece.shape) for piece in pieces),
            *(Planned(key, dtype_name(tensor.dtype), tuple(tensor.shape)) for key, tensor in extras.items()),
        ]
    )

    def chunks() -> Iterator[bytes]:
        name, module = None, None
        for plan in plans:
            piece = by_key.get(plan.key)
            if piece is None:
                yield tensor_bytes(extras[plan.key])
                continue
            if piece.module != name:  # the two factors of a module are neighbours in the layout
                name, module = piece.module, adapter.modules[piece.module]
            assert module is not None
            if module.scale != 1.0:
                raise AssertionError(f"{name}: a writer was given scale {module.scale}; pass adapters through ready()")
            yield tensor_bytes(module.up if piece.side == "up" else module.down)

    write_tensors(path, plans, chunks(), metadata)


def _stored_dtypes(adapter: Adapter) -> dict[str, str]:
    """Each module's dtype on disk: declared by `meta["dtype"]` for lazy results, read off the factors otherwise."""
    declared = adapter.meta.get("dtype")
    if declared is not None:
        return dict.fromkeys(adapter.shapes, dtype_name(declared))
    return {name: dtype_name(module.dtype) for name, module in adapter.modules.items()}
