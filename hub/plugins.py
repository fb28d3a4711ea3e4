"""Plug-ins: a function in a file of the same name. The folder is the registry."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_type_hints

from .errors import BadOption, UnknownMethod


@dataclass(frozen=True)
class Option:
    """A keyword-only parameter of a plug-in."""

    name: str
    type: Any
    default: Any


def names(package: str) -> list[str]:
    """The plug-ins of a package, sorted, without importing them; a leading underscore hides a file."""
    path = import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


def load(package: str, name: str) -> Callable[..., Any]:
    """The function `name` of the file `name` in `package`. Raises UnknownMethod that lists what there is."""
    known = names(package)
    if name not in known:
        kind = package.rsplit(".", 1)[-1]
        raise UnknownMethod(f"{name!r} is none of the {kind}: {', '.join(known)}")
    function: Callable[..., Any] = getattr(import_module(f"{package}.{name}"), name)
    return function


def options(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a plug-in: its keyword-only parameters."""
    hints = get_type_hints(function)
    return {
        parameter.name: Option(parameter.name, hints.get(parameter.name, str), parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def check_options(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` with text converted to each option's type. Raises BadOption for a name or value that does not fit."""
    known = options(function)
    for name in given:
        if name not in known:
            offered = ", ".join(f"{o.name}={o.default}" for o in known.values()) or "none"
            raise BadOption(f"{function.__name__} has no option {name!r}; its options are: {offered}")
    return {name: _convert(known[name], value) for name, value in given.items()}


def _convert(option: Option, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    kinds = [kind for kind in getattr(option.type, "__args__", (option.type,)) if kind is not type(None)]
    if value.lower() in {"none", ""} and len(kinds) < len(getattr(option.type, "__args__", kinds)):
        return None
    if bool in kinds and value.lower() in {"true", "false", "yes", "no", "1", "0"}:
        return value.lower() in {"true", "yes", "1"}
    for kind in (int, float, str):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise BadOption(f"option {option.name} is {value!r}; expected {expected}")
