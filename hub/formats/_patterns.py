"""PEFT's per-module patterns: regular expressions for the end of a path, from a file that nobody vouches for.

Most are plain names and are looked up. A true expression is used only if its worst case is bounded: one that repeats a
group, such as (a+)+, would take for ever.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import FormatError
from ..tensorfile import shown

_COST_LIMIT = 2e9  # steps of the matcher over all modules of a file: some seconds at worst
_PLAIN = re.compile(r"\^?((?:[\w-]|\\?\.)+)\$?", re.ASCII)
_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[^)]?|.", re.DOTALL)


def number(value: Any, where: str) -> float:
    """A number of a configuration. Raises FormatError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise FormatError(f"{where} is {shown(str(value))}, expected a number; correct the configuration")
    return float(value)


def table(value: Any, where: str) -> dict[str, Any]:
    """A table of a configuration; empty for none. Raises FormatError for anything else."""
    if not value:
        return {}
    if not isinstance(value, dict):
        raise FormatError(f"{where} is a {type(value).__name__}, expected a table of names; correct the configuration")
    return value


class Patterns:
    """A table of patterns, ready to be asked for the value of a path: the first pattern that fits it, or its end after
    a dot, wins. `where` names the table in messages, `uses` tells how often it will be asked."""

    def __init__(self, patterns: Mapping[str, Any], where: str, uses: int) -> None:
        self._where = where
        self._plain: dict[tuple[str, bool], tuple[int, Any]] = {}  # (name, for the whole path only) -> order, value
        self._expressions: list[tuple[int, str, Any]] = []
        for order, (key, value) in enumerate(patterns.items()):
            plain = _PLAIN.fullmatch(key)
            if plain:
                self._plain.setdefault((plain[1].replace("\\", ""), key.startswith("^")), (order, value))
            else:
                self._expressions.append((order, key, value))
        self._budget = _COST_LIMIT / max(1, uses * len(self._expressions))

    def value(self, path: str) -> Any:
        """The value for a module's path; None where no pattern fits. Raises FormatError for a pattern that is no
        regular expression, or a ruinous one."""
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", path))]
        found = [self._plain.get((path[start:], False)) for start in starts]
        best = min(
            (one for one in (self._plain.get((path, True)), *found) if one), default=None, key=lambda one: one[0]
        )
        for order, key, value in self._expressions:
            if best is not None and best[0] < order:
                break
            expression = self._compiled(key, path)
            if any(expression.fullmatch(path, start) for start in starts):
                return value
        return best[1] if best else None

    def _compiled(self, key: str, path: str) -> re.Pattern[str]:
        if _cost(key, len(path)) > self._budget:
            raise FormatError(f"{self._where} has {shown(key)}, which could take for ever to match; write module names")
        try:
            return re.compile(key)
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(f"{self._where} has {shown(key)}, which is no regular expression ({error})") from None


def _cost(key: str, length: int) -> float:
    """An upper bound of the steps that a backtracking matcher takes for `key` on a text of `length`; infinite for a
    repeated group and for what refers back to one."""
    if len(key) > 1000:
        return math.inf
    steps, alternatives, last = 1.0, [1], ""
    for token in _TOKENS.findall(key):
        if token in {"*", "+", "{"}:
            if last == ")":
                return math.inf
            steps *= length + 1
        elif token == "?":
            steps *= 2
        elif token == "|":
            alternatives[-1] += 1
        elif token == "(?P" or re.fullmatch(r"\\[1-9]", token):
            return math.inf
        elif token.startswith("("):
            alternatives.append(1)
        elif token == ")" and len(alternatives) > 1:
            steps *= alternatives.pop()
        last = token
    return steps * math.prod(alternatives)
