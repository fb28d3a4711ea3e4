"""Would an adapter apply? Its modules against a base model's, and against what a serving target can load."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadOption, FormatError
from .formats._names import component
from .tensorfile import open_tensors, shown

if TYPE_CHECKING:
    from .adapter import Adapter
    from .lowrank import Shape

Dims = tuple[int, ...]
TARGETS = ("peft", "diffusers", "vllm")
_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}  # GPT-2's layers store their weight as (inputs, outputs)
_ROWS = re.compile(r"\.qkv\.[qkv]$")  # rows of a fused projection
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's max_lora_rank may take


@dataclass(frozen=True)
class Coverage:
    """What became of each module: `matched` fits the base, `unmatched` has no place in it, `misfit` the wrong shape.

    Without a base all modules count as matched. `zero` modules change nothing, `nonfinite` ones hold NaN or Inf;
    `problems` are what a serving target would refuse.
    """

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    misfit: tuple[str, ...]
    zero: tuple[str, ...]
    nonfinite: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the adapter would apply in full."""
        return bool(self.matched) and not (self.unmatched or self.misfit or self.nonfinite or self.problems)


def coverage(adapter: Adapter, base: Mapping[str, Dims] | None = None, target: str | None = None) -> Coverage:
    """Compare an adapter with a base's weights (module name -> weight shape) and a serving target.

    Reads every factor once. Raises BadOption for an unknown target.
    """
    if target is not None and target not in TARGETS:
        raise BadOption(f"target is {target!r}; expected one of {', '.join(TARGETS)}")
    matched, unmatched, misfit, zero, nonfinite = [], [], [], [], []
    suffixes = _by_suffix(base or {})
    for name, shape in adapter.shapes.items():
        module = adapter.modules[name]
        if not bool(module.up.isfinite().all() and module.down.isfinite().all()):
            nonfinite.append(name)
        elif not bool(module.up.any() and module.down.any()) or module.scale == 0.0:
            zero.append(name)
        if base is None:
            matched.append(name)
            continue
        found = _find(name, base, suffixes)
        if found is None:
            unmatched.append(name)
        elif not _fits(name, shape, base[found]):
            misfit.append(f"{name}: adapter {shape}, base {'x'.join(map(str, base[found]))}")
        else:
            matched.append(name)
    problems = _problems(adapter, target) if target else []
    groups = (matched, unmatched, misfit, zero, nonfinite, problems)
    return Coverage(*(tuple(group) for group in groups))


def base_weights(path: Path) -> dict[str, Dims]:
    """Module name -> weight shape of a base: a safetensors file, a config.json, a model folder or a pipeline folder.

    A configuration is built without memory (torch's meta device) by transformers or diffusers. Raises FormatError.
    """
    if path.suffix == ".safetensors":
        shapes = {key: info.shape for key, info in open_tensors(path).tensors.items()}
        return {key.removesuffix(".weight"): shape for key, shape in shapes.items() if key.endswith(".weight")}
    folder = path if path.is_dir() else path.parent
    index = folder / "model_index.json"
    if path.is_dir() and index.is_file():
        parts = [part for part in _load_json(index) if (folder / part / "config.json").is_file()]
        return {f"{part}.{name}": shape for part in parts for name, shape in base_weights(folder / part).items()}
    config_path = folder / "config.json" if path.is_dir() else path
    if not config_path.is_file():
        raise FormatError(
            f"{path}: is no base that lorahub knows; name a config.json, a model folder or a safetensors file"
        )
    model = _empty_model(config_path, _load_json(config_path))
    return {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in model.named_parameters(remove_duplicate=False)  # a tied head is a module of its own
        if name.endswith(".weight")
    }


def _empty_model(path: Path, config: Mapping[str, Any]) -> Any:
    import huggingface_hub.errors
    import torch

    # a library that is given nonsense fails wherever its arithmetic first meets it
    nonsense = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
    strict: type[Exception] = getattr(huggingface_hub.errors, "StrictDataclassError", ValueError)
    library = "diffusers" if "_class_name" in config else "transformers"
    try:
        with torch.device("meta"):
            return _diffusers_model(path, config) if library == "diffusers" else _transformers_model(config)
    except (*nonsense, strict, ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FormatError(f"{path}: {library} cannot build this model ({shown(reason)})") from None


def _diffusers_model(path: Path, config: Mapping[str, Any]) -> Any:
    import diffusers

    kind: Any = getattr(diffusers, str(config["_class_name"]), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise FormatError(f"{path}: diffusers has no model {shown(str(config['_class_name']))}; update diffusers")
    made: Any = kind
    return made.from_config(dict(config))


def _transformers_model(config: Mapping[str, Any]) -> Any:
    import transformers

    settings = transformers.AutoConfig.for_model(**{"model_type": "", **config})
    names = config.get("architectures") or [""]
    kind: Any = getattr(transformers, str(names[0]), None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind(settings)
    bare: Any = transformers.AutoModel
    return bare.from_config(settings)


def _load_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _by_suffix(base: Mapping[str, Dims]) -> dict[str, list[str]]:
    """Every dotted suffix of the base's names, so that a task model's extra prefix does not hide a module."""
    suffixes: dict[str, list[str]] = {}
    for name in base:
        parts = name.split(".")
        for start in range(len(parts)):
            suffixes.setdefault(".".join(parts[start:]), []).append(name)
    return suffixes


def _find(name: str, base: Mapping[str, Dims], suffixes: Mapping[str, list[str]]) -> str | None:
    candidates = [name, name.replace(".text_model.", "."), name.partition(".")[2]]
    if _ROWS.search(name):
        candidates.append(name.rpartition(".")[0])
    for candidate in candidates:
        if candidate in base:
            return candidate
        if len(suffixes.get(candidate, ())) == 1:
            return suffixes[candidate][0]
    # an adapter of a task model on the bare model: drop leading segments
    parts = name.split(".")
    for start in range(1, len(parts) - 2):
        if ".".join(parts[start:]) in base:
            return ".".join(parts[start:])
    return None


def _fits(name: str, shape: Shape, weight: Dims) -> bool:
    flat = (weight[0], math.prod(weight[1:])) if weight else (0, 0)
    if shape.embedding or name.rpartition(".")[2] in _CONV1D:
        flat = flat[::-1]
    fused = flat[0] // 3 if _ROWS.search(name) else flat[0]
    return (fused, flat[1]) == (shape.outputs, shape.inputs)


def _problems(adapter: Adapter, target: str) -> list[str]:
    problems = []
    components = {component(name) for name in adapter.shapes}
    outside = sorted(name for name in adapter.shapes if not component(name))
    if target == "diffusers" and outside:
        problems.append(f"modules outside a pipeline's components: {', '.join(outside[:3])}")
    if target == "peft" and len(components) > 1:
        problems.append(f"a PEFT folder holds one model, this adapts {', '.join(filter(None, sorted(components)))}")
    if target == "vllm":
        ranks = {shape.rank for shape in adapter.shapes.values()}
        if max(ranks, default=0) > _VLLM_RANKS[-1]:
            problems.append(f"rank {max(ranks)} is above vLLM's largest, {_VLLM_RANKS[-1]}: compress first")
        if len(ranks) > 1:
            problems.append(f"ranks {min(ranks)} to {max(ranks)}: vLLM scales all modules alike; use one rank")
        if adapter.extras:
            problems.append(f"vLLM refuses saved modules and biases: {', '.join(sorted(adapter.extras)[:3])}")
        if any(shape.kernel for shape in adapter.shapes.values()):
            problems.append("vLLM has no adapters for convolutions")
    return problems
