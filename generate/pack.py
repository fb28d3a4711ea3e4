"""Packs: a library's checkpoints in one small file, any expert's adapter rebuilt on demand, with its error.

Two ways to make one: ICM-LoRA's network (`pack_network`), and the principal components of the experts
(`pack_components`), which any network has to beat at equal size. Both know the experts that they hold and no others.
Importing this needs torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..hub.adapter import Adapter
from ..hub.errors import BadOption, FormatError, UnknownAdapter
from .cvae import Convolutions, Course, Lessons, fit, rebuilt, recipe_from, recipe_json
from .layout import Layout, Statistics, principal
from .library import Vectors
from .stored import read, write
from .taught import School, directions

BITS = (32, 16, 8, 4)

_ENTRY = "lorahub_pack"
_VERSION = 1
_LEAST_STEP = 2**-24  # the least number above zero in float16


@dataclass(frozen=True)
class Rebuilt:
    """An expert's adapter out of a pack. error: ||delta - mean checkpoint's delta|| / ||mean checkpoint's delta||."""

    adapter: Adapter
    error: float


@dataclass(frozen=True, eq=False)
class Pack:
    """Experts in few bytes. kind: "network" or "components"; errors: one for each expert, see `Rebuilt`.

    scales: mean and root of the variance of each factor over the library, (factors, 2).
    """

    kind: Literal["network", "components"]
    layout: Layout
    names: tuple[str, ...]
    scales: Tensor
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    errors: tuple[float, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Of all tensors; a file has its header on top."""
        return sum(part.nbytes for part in (self.scales, *self.tensors.values()))

    def rebuild(self, name: str) -> Rebuilt:
        """An expert's adapter. Raises UnknownAdapter for a name that the pack does not hold."""
        if name not in self.names:
            raise UnknownAdapter(f"the pack holds no {name!r}; it holds {', '.join(self.names[:8])} ...")
        row = self.names.index(name)
        return Rebuilt(self.layout.adapter(self.vector(row), name=name), self.errors[row])

    def vector(self, row: int) -> Tensor:
        """An expert's vector (size,). Raises FormatError where the pack is damaged."""
        made = _decoded(self, row) if self.kind == "network" else _combined(self, row)
        if made.shape != (self.layout.size,):
            raise FormatError(f"the pack makes a vector of shape {tuple(made.shape)}; expected ({self.layout.size},)")
        return _statistics(self.layout, self.scales).restore(made)

    def save(self, path: Path, *, force: bool = False) -> Path:
        """Write one safetensors file. Raises TargetExists, FormatError as `stored.save` does."""
        said = {
            "version": _VERSION, "kind": self.kind, "layout": self.layout.as_json(), "names": list(self.names),
            "errors": list(self.errors), "facts": dict(self.facts),
        }  # fmt: skip
        held = {"scales": self.scales, **self.tensors}
        return write(path, held, {_ENTRY: json.dumps(said, sort_keys=True)}, force=force)


def load_pack(path: Path) -> Pack:
    """Read a pack. Raises FormatError, in one line, for a file that is damaged or holds something else."""
    said, tensors = read(path, _ENTRY, "a pack", _VERSION)
    try:
        if said["kind"] not in ("network", "components"):
            raise FormatError(f"is a pack of the unknown kind {said['kind']!r}")
        layout, scales = Layout.from_json(said["layout"]), tensors.pop("scales")
        if scales.shape != (2 * len(layout.places), 2) or len(said["errors"]) != len(said["names"]):
            raise FormatError("its parts do not belong together; make the pack anew")
        names, errors = tuple(map(str, said["names"])), tuple(map(float, said["errors"]))
        pack = Pack(said["kind"], layout, names, scales, tensors, said["facts"], errors)
        for row in range(len(names)):
            if not bool(torch.isfinite(pack.vector(row)).all()):
                raise FormatError(f"it makes NaN or Inf for {names[row]}; make the pack anew")
    except (FormatError, BadOption) as error:
        raise FormatError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise FormatError(f"{path}: its description is damaged ({reason}); make the pack anew") from None
    return pack


def pack_network(
    school: School,
    *,
    conditions: Sequence[Vectors] | None = None,
    weight: float = 0.005,
    latent: int = 256,
    channels: int = 8,
    stages: int = 12,
    norm: Literal["batch", "group"] = "batch",
    steps: int = 1500,
    batch: int = 16,
    rate: float = 2e-4,
    bits: int = 16,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Pack:
    """ICM-LoRA's network for all experts: its decoder, every expert's condition and the mean of its codes.

    conditions: each expert's task vectors (k, dim); None takes the descriptions' vectors. The other options are those
    of `learned.icm`. bits: 16 or 32, of all that is kept.
    """
    if bits not in (16, 32):
        raise BadOption(f"bits is {bits}; expected 16 or 32")
    given = [torch.as_tensor(some).float() for some in (school.vectors if conditions is None else conditions)]
    scales = _scales(school)
    values = [_statistics(school.layout, scales).standardise(some) for some in school.weights]
    owners = torch.arange(len(values)).repeat_interleave(torch.tensor([len(some) for some in values]))
    recipe = Convolutions(school.layout.size, given[0].shape[1], latent, channels, stages, norm)
    course = Course(steps, batch, rate, weight, mean=True, falling=0.5, seed=seed)
    fitted = fit(recipe, Lessons(torch.cat(values), owners, given), course, progress=progress)
    keys = directions(given)
    network = rebuilt(recipe, fitted.tensors)
    with torch.inference_mode():
        rows = [network.encode(some, key.expand(len(some), -1)) for some, key in zip(values, keys, strict=True)]
        codes = torch.stack([row.mean.mean(dim=0) for row in rows]).clone()
    held = {name: part for name, part in fitted.tensors.items() if name.startswith("decoder.")}
    dtype = torch.float16 if bits == 16 else torch.float32
    tensors = {"codes": codes.to(dtype), "keys": keys.to(dtype)}
    tensors |= {name: part.to(dtype) if part.is_floating_point() else part for name, part in held.items()}
    facts = {"recipe": recipe_json(recipe), "told": {**fitted.told, "steps": steps, "seed": seed}}
    return _judged(Pack("network", school.layout, school.names, scales, tensors, facts), school)


def pack_components(school: School, *, size: int | None = None, count: int | None = None, bits: int = 16) -> Pack:
    """The mean of all experts, their principal components, and each expert's place among them.

    count: components; by default as many as fit into `size` bytes (all that there are without either; none at all
    where even the mean does not fit). bits: 32, 16, 8 or 4 of every number of components and mean, rounded to a step
    of each factor's largest number in the component where less than 16; places have 16 or more.
    """
    if bits not in BITS or (count is not None and count < 0):
        raise BadOption(f"bits is {bits}, count {count}; expected one of {', '.join(map(str, BITS))}, and 0 or more")
    scales = _scales(school)
    values = torch.stack([_statistics(school.layout, scales).standardise(some).mean(dim=0) for some in school.weights])
    mean = values.mean(dim=0, keepdim=True)
    axes = principal(values - mean, len(values)).axes[:count]
    made = _components(school, scales, values, mean, axes, bits)
    while size is not None and len(axes) and made.nbytes > size:
        # every component takes as many bytes as the next one
        each = (made.nbytes - _components(school, scales, values, mean, axes[:0], bits).nbytes) / len(axes)
        axes = axes[: len(axes) - max(1, math.ceil((made.nbytes - size) / each))]
        made = _components(school, scales, values, mean, axes, bits)
    return _judged(made, school)


# --- parts ----------------------------------------------------------------------------------------------------------


def _scales(school: School) -> Tensor:
    known = Statistics.by_tensor(torch.cat(school.weights), school.layout)
    starts = torch.tensor([side.start for side in school.layout.tensors])
    return torch.stack([known.mean[starts], known.spread[starts]], dim=1)


def _statistics(layout: Layout, scales: Tensor) -> Statistics:
    return Statistics(*scales.float().repeat_interleave(layout.lengths, dim=0).T)


def _judged(pack: Pack, school: School) -> Pack:
    means = (some.mean(dim=0) for some in school.weights)
    return replace(pack, errors=tuple(pack.layout.error(pack.vector(row), mean) for row, mean in enumerate(means)))


def _decoded(pack: Pack, row: int) -> Tensor:
    recipe = recipe_from(pack.facts["recipe"], Convolutions)
    wide = {name: part.float() if part.is_floating_point() else part for name, part in pack.tensors.items()}
    codes, keys = wide.pop("codes"), wide.pop("keys")
    with torch.inference_mode():
        made = rebuilt(recipe, wide, only="decoder").decode(codes[row][None], keys[row][None])
        return made[0, : pack.layout.size].clone()


def _components(school: School, scales: Tensor, values: Tensor, mean: Tensor, axes: Tensor, bits: int) -> Pack:
    kept = _quantised(torch.cat([mean, axes]), school.layout, bits)
    shown = _unquantised(kept, school.layout, bits).double()
    dtype = torch.float32 if bits == 32 else torch.float16
    places = torch.zeros(len(values), 0, dtype=dtype)
    if len(axes):  # places among the components as they are after rounding
        places = torch.linalg.lstsq(shown[1:].T, (values - shown[:1]).double().T).solution.T.to(dtype).contiguous()
    return Pack("components", school.layout, school.names, scales, {**kept, "places": places}, {"bits": bits})


def _combined(pack: Pack, row: int) -> Tensor:
    bits = pack.facts["bits"]
    if bits not in BITS:
        raise FormatError(f"holds components of {bits} bits; expected one of {', '.join(map(str, BITS))}")
    counts = [len(pack.tensors["rows"]), len(pack.tensors.get("steps", pack.tensors["rows"]))]
    if counts != [1 + pack.tensors["places"].shape[1]] * 2:
        raise FormatError(f"holds {counts[0]} components for places among {pack.tensors['places'].shape[1]}")
    shown = _unquantised(pack.tensors, pack.layout, bits)
    made: Tensor = shown[0] + pack.tensors["places"][row].float() @ shown[1:]
    return made


def _quantised(rows: Tensor, layout: Layout, bits: int) -> dict[str, Tensor]:
    """Rows (n, size) in fewer bits: as floats, or whole numbers with a step for each factor of each row."""
    if bits >= 16:
        return {"rows": rows.to(torch.float32 if bits == 32 else torch.float16)}
    top = 2 ** (bits - 1) - 1
    steps = torch.stack([rows[:, side].abs().amax(dim=1) / top for side in layout.tensors], dim=1)
    steps = steps.clamp_min(_LEAST_STEP).to(torch.float16)
    whole = (rows / steps.float().repeat_interleave(layout.lengths, dim=1)).round().clamp(-top, top).int() + top + 1
    if bits == 4:
        even = torch.nn.functional.pad(whole, (0, whole.shape[1] % 2))
        whole = even[:, ::2] * 16 + even[:, 1::2]
    return {"rows": whole.to(torch.uint8), "steps": steps}


def _unquantised(tensors: Mapping[str, Tensor], layout: Layout, bits: int) -> Tensor:
    rows = tensors["rows"]
    if bits >= 16:
        return rows.float()
    if bits == 4:
        rows = torch.stack([rows // 16, rows % 16], dim=2).flatten(1)[:, : layout.size]
    steps = tensors["steps"].float().repeat_interleave(layout.lengths, dim=1)
    wide: Tensor = (rows.float() - 2 ** (bits - 1)) * steps
    return wide
