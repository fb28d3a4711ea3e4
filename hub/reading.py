"""Reading adapters: what a file is (from its header alone), its fingerprint, and its modules (lazily)."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bases import Base, from_shapes
from .errors import BadOption, FormatError, IncompatibleAdapters
from .formats import _foreign, _native
from .formats._families import FACTOR_ROLES, SIDE_ROLES, Family, Form, build, checked_form, family_of
from .metadata import Description, describe
from .naming import name_from_path
from .plugins import names as plugin_names
from .source import CANONICAL_KEY, Source, open_source, origin_json
from .tensorfile import Planned, header_bytes, layout, shown

if TYPE_CHECKING:
    from torch import Tensor

    from .adapter import Adapter
    from .lowrank import LowRank

FORMATS = f"{__package__}.formats"


@dataclass(frozen=True)
class Inspection:
    """All that is known of an adapter without reading a tensor: header, configuration, card and sidecars."""

    path: Path
    format: str
    base: str | None
    base_from: str | None
    ranks: tuple[int, int]
    modules: int
    parameters: int
    size: int
    mergeable: bool
    reason: str | None
    title: str | None
    description: str
    triggers: tuple[str, ...]
    tags: tuple[str, ...]
    metadata: Mapping[str, str]
    extras: tuple[str, ...]
    warnings: tuple[str, ...]
    dialects: Mapping[str, int]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class ModulePlan:
    """How one module is made: its tensors by role, its shape and which rows of a fused delta are its own."""

    family: Family
    form: Form
    keys: Mapping[str, str]
    rows: Sequence[int] | None
    dialect: str
    stored_scale: float | None  # of the dialect, without an alpha tensor; None where nothing says it


@dataclass(frozen=True)
class Plan:
    """An opened adapter, interpreted: modules by canonical name, and what else the file holds."""

    source: Source
    format: str
    modules: Mapping[str, ModulePlan]
    extras: Mapping[str, str]  # name -> tensor key
    obstacle: str | None
    warnings: tuple[str, ...]
    dialects: Mapping[str, int]


def inspect(path: Path, *, allow_pickle: bool = False, dialect: str | None = None) -> Inspection:
    """Describe an adapter from its header. Raises FormatError (or UnsafeFile) if it is none that lorahub reads."""
    plan = interpret(open_source(Path(path), allow_pickle=allow_pickle), dialect)
    scales = sorted({round(_scale(plan, module, None), 6) for module in plan.modules.values()})
    return replace(_inspection(plan), scales=tuple(scales))


def examine(path: Path, *, allow_pickle: bool = False) -> tuple[Inspection, str]:
    """Inspection (without scales) and fingerprint, in one opening of the file."""
    plan = interpret(open_source(Path(path), allow_pickle=allow_pickle))
    return _inspection(plan), _fingerprint(plan)


def fingerprint(path: Path, *, allow_pickle: bool = False) -> str:
    """sha256 over what the adapter computes with: tensor names, shapes, bytes, and scales kept outside the tensors.

    The header's metadata and the order on disk do not count, so a re-headered copy has the same fingerprint.
    Raises FormatError where a tensor holds a NaN or an infinity.
    """
    return _fingerprint(interpret(open_source(Path(path), allow_pickle=allow_pickle)))


def read(path: Path, *, allow_pickle: bool = False, dialect: str | None = None, alpha: float | None = None) -> Adapter:
    """The adapter, its modules lazy. `alpha` serves modules for which nothing stores one.

    Raises IncompatibleAdapters for an adapter that has no plain low-rank delta (DoRA, IA3 ...), saying why.
    """
    from .adapter import Adapter, LazyModules
    from .lowrank import Shape

    plan = interpret(open_source(Path(path), allow_pickle=allow_pickle), dialect)
    if plan.obstacle:
        raise IncompatibleAdapters(f"{path}: {plan.obstacle}")
    description = describe(plan.source)
    base = description.base if description.base.name else _guessed_base(plan)
    shapes = {
        name: Shape(module.form.rank, _rows(module), module.form.inputs, module.form.kernel, module.form.embedding)
        for name, module in plan.modules.items()
    }
    return Adapter(
        modules=LazyModules(shapes, lambda name: _load(plan, plan.modules[name], alpha)),
        base=base.name,
        extras={name: plan.source.file.tensor(key) for name, key in plan.extras.items()},
        meta={
            "name": name_from_path(str(Path(path).resolve()), folder=Path(path).is_dir()),
            "path": str(path),
            "format": plan.format,
            "config": plan.source.config,
            "metadata": dict(plan.source.metadata),
            "warnings": plan.warnings,
        },
    )


def canonical(path: Path, *, allow_pickle: bool = False) -> tuple[bytes, Iterator[bytes]]:
    """Canonical bytes of an adapter: header, then tensors in layout order; equal adapters give equal bytes.

    All that is not a tensor (configuration, header metadata) is kept in one metadata entry of sorted JSON.
    """
    source = open_source(Path(path), allow_pickle=allow_pickle)
    plans = layout(Planned(key, info.dtype, info.shape) for key, info in source.tensors.items())
    header = header_bytes(plans, {CANONICAL_KEY: origin_json(source)})
    return header, (source.file.raw(plan.key) for plan in plans)


def interpret(source: Source, dialect: str | None = None) -> Plan:
    """Sort a source's tensors into modules and extras, each module by the dialect that claims it.

    Raises FormatError where half a pair is missing, two tensors mean one module, or nothing belongs to an adapter.
    """
    readers = _readers(dialect)
    groups: dict[tuple[str, str], dict[str, str]] = {}
    extras: dict[str, str] = {}
    for key in source.tensors:
        for name, reader in readers:
            place = reader.claim(key, source)
            if place:
                roles = groups.setdefault((name, place.module), {})
                if place.role in roles:
                    raise FormatError(
                        f"{source.path}: {shown(key)} and {shown(roles[place.role])} are the same factor: damaged"
                    )
                roles[place.role] = key
                break
        else:
            extras[_extra_name(key)] = key
    obstacle = _obstacle(source, groups)
    try:
        modules = _modules(source, groups, extras, dict(readers))
    except FormatError:
        if obstacle is None:
            raise
        modules, extras = {}, {_extra_name(key): key for key in source.tensors}  # LoRA's names, another type's shapes
    if not modules and obstacle is None:
        raise FormatError(_no_adapter(source))
    dialects = Counter(module.dialect for module in modules.values())
    return Plan(
        source=source,
        format=_format(source, dialects, obstacle),
        modules=dict(sorted(modules.items())),
        extras=extras,
        obstacle=obstacle,
        warnings=tuple(_warnings(source, modules)),
        dialects=dict(dialects),
    )


@cache
def _readers(dialect: str | None) -> list[tuple[str, Any]]:
    known = plugin_names(FORMATS)
    if dialect is not None and dialect not in known:
        raise BadOption(f"dialect is {dialect!r}; expected one of {', '.join(known)}")
    return [(name, import_module(f"{FORMATS}.{name}")) for name in ([dialect] if dialect else known)]


def _modules(
    source: Source,
    groups: Mapping[tuple[str, str], dict[str, str]],
    extras: dict[str, str],
    readers: Mapping[str, Any],
) -> dict[str, ModulePlan]:
    """Plans by canonical name; roles that no family uses (biases, full differences) are moved to `extras`."""
    by_dialect: dict[str, list[str]] = {}
    for dialect, module in groups:
        by_dialect.setdefault(dialect, []).append(module)
    canonical = {
        (dialect, module): name
        for dialect, members in by_dialect.items()
        for module, name in readers[dialect].names(members).items()
    }
    modules: dict[str, ModulePlan] = {}
    for place, roles in groups.items():
        name = canonical[place]
        used = _plan_module(source, place, name, roles, readers[place[0]])
        for part, plan in used.items():
            if part in modules:
                raise FormatError(f"{source.path}: two sets of tensors mean module {part}: damaged, or two adapters")
            modules[part] = plan
        spare = {role for role in roles if role in {"bias", "diff", "diff_b", "dora"} or not used}
        extras.update({_extra_name(roles[role]): roles[role] for role in spare - (SIDE_ROLES if used else set())})
    return modules


def _plan_module(
    source: Source,
    place: tuple[str, str],
    name: str,
    roles: Mapping[str, str],
    reader: Any,
) -> dict[str, ModulePlan]:
    infos = {role: source.tensors[key] for role, key in roles.items()}
    family = family_of(place[1], infos, str(source.path))
    if family is None:
        return {}
    try:
        form = checked_form(family, infos)
    except FormatError as error:
        raise FormatError(f"{source.path}: {name}: {error}; the file is damaged") from None
    form = _kernel_by_name(name, family, form)
    scale = _stored_scale(source, place, form, reader)
    return {
        part.name: ModulePlan(family, form, dict(roles), part.rows, place[0], scale)
        for part in _native.parts(name, form.outputs)
    }


def _stored_scale(source: Source, place: tuple[str, str], form: Form, reader: Any) -> float | None:
    """What the dialect says of the scale; LyCORIS ignores alpha where LoKr's factors are both dense, PEFT does not."""
    if form.fixed_scale and place[0] != "peft":
        return 1.0
    found: float | None = reader.scale(source, place[1], 0 if form.fixed_scale else form.divisor)
    return found


def _kernel_by_name(name: str, family: Family, form: Form) -> Form:
    """Early LyCORIS flattened a 3x3 convolution's input; its name alone tells that it is one."""
    leaf = name.rsplit(".", 1)[-1]
    flat_convolution = family.name != "lora" and not form.kernel and leaf in {"conv", "conv1", "conv2"}
    if flat_convolution and name.startswith("unet.") and form.inputs % 9 == 0:
        return form._replace(kernel=(3, 3))
    return form


def _rows(module: ModulePlan) -> int:
    return module.form.outputs if module.rows is None else len(module.rows)


def _load(plan: Plan, module: ModulePlan, alpha: float | None) -> LowRank:
    tensors = {role: _factor(plan, key) for role, key in module.keys.items() if role in FACTOR_ROLES}
    made = build(module.family, tensors, module.form, _scale(plan, module, alpha))
    return made if module.rows is None else replace(made, up=made.up[list(module.rows)])


def _factor(plan: Plan, key: str) -> Tensor:
    """The tensor; eight-bit floats, which torch does not calculate with, as float16, which holds all of them."""
    import torch

    tensor = plan.source.file.tensor(key)
    return tensor.to(torch.float16) if plan.source.tensors[key].dtype.startswith("F8") else tensor


def _scale(plan: Plan, module: ModulePlan, alpha: float | None) -> float:
    """The one place where alpha becomes a scale: an alpha tensor first, then the dialect, then `alpha`, then 1."""
    key = module.keys.get("alpha")
    if key is not None and not module.form.fixed_scale:
        value = plan.source.file.scalar(key)
        if not math.isfinite(value):
            raise FormatError(f"{plan.source.path}: {shown(key)} is {value}, expected a number; the training diverged")
        return value / module.form.divisor if value else 1.0  # LyCORIS writes 0 for "alpha equals the rank"
    if module.stored_scale is None:
        return 1.0 if alpha is None else alpha / module.form.divisor
    return module.stored_scale


def _fingerprint(plan: Plan) -> str:
    source, digest = plan.source, hashlib.sha256()
    for key in sorted(source.tensors):
        info, data = source.tensors[key], source.file.raw(key)
        if source.file.nonfinite(key, data):
            raise FormatError(
                f"{source.path}: {shown(key)} holds NaN or Inf; the training diverged or the file is damaged"
            )
        digest.update(f"{key}\0{info.dtype}\0{info.shape}\0".encode())
        digest.update(data)
    outside = {
        name: module.stored_scale
        for name, module in plan.modules.items()
        if "alpha" not in module.keys and module.stored_scale not in (None, 1.0)
    }
    foreign = plan.format if plan.obstacle else None  # the same tensors mean another thing then
    if outside or foreign:
        digest.update(json.dumps([outside, foreign], sort_keys=True).encode())
    return digest.hexdigest()


def _inspection(plan: Plan) -> Inspection:
    description: Description = describe(plan.source)
    base = description.base if description.base.name else _guessed_base(plan)
    ranks = [module.form.rank for module in plan.modules.values()]
    return Inspection(
        path=plan.source.path,
        format=plan.format,
        base=base.name,
        base_from=base.origin,
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        modules=len(plan.modules),
        parameters=sum(m.form.rank * (_rows(m) + m.form.inputs) for m in plan.modules.values()),
        size=plan.source.weights.stat().st_size,
        mergeable=plan.obstacle is None,
        reason=plan.obstacle,
        title=description.title,
        description=description.text,
        triggers=description.triggers,
        tags=description.tags,
        metadata=plan.source.metadata,
        extras=tuple(sorted(plan.extras)),
        warnings=plan.warnings,
        dialects=plan.dialects,
        scales=(),
    )


def _guessed_base(plan: Plan) -> Base:
    return from_shapes((name, module.form.inputs, _rows(module)) for name, module in plan.modules.items())


def _obstacle(source: Source, groups: Mapping[tuple[str, str], Mapping[str, str]]) -> str | None:
    if "list:0" in source.tensors:
        count = len(source.tensors)
        return f"a list of {count} tensors in the order of the model's modules: only that model can name them"
    kind = _foreign.foreign_type(source.config, source.tensors)
    if kind:
        return _foreign.type_reason(kind)
    if any("dora" in roles for roles in groups.values()):
        return _foreign.config_reason({"use_dora": True})
    return _foreign.config_reason(source.config or {})


def _format(source: Source, dialects: Mapping[str, int], obstacle: str | None) -> str:
    declared = _foreign.declared_type(source.config).lower()
    if declared not in {"", "lora"}:
        return f"peft-{declared}"
    if "list:0" in source.tensors:
        return "cloneofsimo-list"
    kind = _foreign.foreign_type(source.config, source.tensors) if obstacle else None
    if kind:
        return f"peft-{kind.lower()}"
    return "+".join(sorted(dialects, key=lambda name: (-dialects[name], name))) or "unknown"


def _warnings(source: Source, modules: Mapping[str, ModulePlan]) -> Iterable[str]:
    if any(module.stored_scale is None and "alpha" not in module.keys for module in modules.values()):
        yield "nothing stores alpha: scale 1 is assumed; say --alpha if you know it"
    declared = (source.config or {}).get("r")
    ranks = {module.form.divisor for module in modules.values()}
    if isinstance(declared, int) and ranks and not (source.config or {}).get("rank_pattern") and ranks != {declared}:
        yield f"the configuration says r={declared}, the tensors have rank {', '.join(map(str, sorted(ranks)))}"


def _extra_name(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _no_adapter(source: Source) -> str:
    some = ", ".join(map(shown, sorted(source.tensors)[:3])) or "no tensors"
    return (
        f"{source.path}: holds no adapter tensors (found {some}); expected pairs such as lora_A/lora_B, "
        "lora_down/lora_up, lora_a/lora_b, hada_* or lokr_*"
    )
