"""Adapters that guide side by side: several passes predict, the bare base stands for no words, their mean is followed.

Added to the weights together, adapters disturb each other: a style's was taught on other things than those that the
other adapter brought, and takes them for what it knows. Here they act in passes of their own. With v_0 the base's
prediction, v_k that of pass k, and g the scale of classifier-free guidance, a step follows

    v = v_0(no words) + g * mean_k(v_k(words) - v_0(no words))

Where every adapter has a pass to itself, this is composable diffusion (Liu et al. 2022) with adapters in the place of
concepts, and LoRA Composite (Zhong et al. 2024) is the same with v_k(no words) in the place of v_0(no words), so that
guidance strengthens words alone; here it strengthens what the adapters add as well. A pass may also have several
adapters: all of them in one and some of them in another give those more say. Costs one pass of the base and those
given, of half a batch each. Importing this needs torch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hub.adapter import Adapter
from ..hub.errors import BadOption, IncompatibleAdapters
from .gated import Shelf, fused

HALVES = ("first", "second")
OWN, BARE = "own", "bare"  # what predicts without words: each adapter itself, or the base
BLANKS = (BARE, OWN)


@dataclass
class _Turn:
    """Which pass is under way, None for that of the bare base."""

    number: int | None = None


@contextmanager
def composed(
    model: nn.Module,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    passes: Sequence[Sequence[float]] | None = None,
    component: str = "",
    wordless: str = "first",
    blank: str = BARE,
) -> Iterator[nn.Module]:
    """The denoiser, whose guided predictions are composed of several passes inside the block.

    The pipeline is left as it is: it calls the model with a doubled batch, half of it without words, guides with what
    comes back, and gets v_0 and the mean of the v_k. weights: multiply deltas, default 1. passes: further weights, one
    for each adapter in each pass; None for a pass of its own for each adapter. A pass in which nothing acts is left
    out, and without any the model is as it was. wordless: which half has no words, "first" in diffusers' pipelines,
    "second" in PicturePipeline. blank: "own" for LoRA Composite. component: as for `fused`. Raises BadOption;
    IncompatibleAdapters as `fused` does and, when the model runs, for a batch that is not doubled.
    """
    if wordless not in HALVES or blank not in BLANKS:
        raise BadOption(f"wordless is {wordless!r}, blank {blank!r}; expected first or second, bare or own")
    acting = _casts(adapters, [1.0] * len(adapters) if weights is None else weights, passes)
    if not acting:
        yield model
        return
    turn, shelf = _Turn(), Shelf()
    with ExitStack() as stack:
        for number, cast in enumerate(acting):
            mine = functools.partial(_is_turn, turn, number)
            some, shares = zip(*cast, strict=True)
            stack.enter_context(fused(model, some, weights=shares, component=component, shelf=shelf, when=mine))
        stack.enter_context(_calling(model, _composing(model, turn, len(acting), wordless, blank)))
        yield model


def _casts(
    adapters: Sequence[Adapter], weights: Sequence[float], passes: Sequence[Sequence[float]] | None
) -> list[list[tuple[Adapter, float]]]:
    """Who acts in each pass, and with which weight."""
    count = len(adapters)
    if passes is None:
        passes = [[float(i == k) for i in range(count)] for k in range(count)]
    if len(weights) != count or any(len(one) != count for one in passes):
        raise BadOption(f"expected a weight for each of {count} adapters, and one in every pass")
    found = [
        [(adapter, weight * part) for adapter, weight, part in zip(adapters, weights, one, strict=True)]
        for one in passes
    ]
    acting = [[(adapter, weight) for adapter, weight in cast if weight != 0] for cast in found]
    return [cast for cast in acting if cast]


def _is_turn(turn: _Turn, number: int) -> bool:
    return turn.number == number


def refusal(model: nn.Module) -> str | None:
    """Why adapters cannot be composed in this denoiser, or None where nothing is known against it."""
    if "guidance" in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} takes guidance as an input and has no pass without words to compose with"
    return None


@contextmanager
def _calling(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The model with another `forward`; afterwards as it was, also where somebody else had replaced it."""
    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _composing(model: nn.Module, turn: _Turn, count: int, wordless: str, blank: str) -> Callable[..., Any]:
    """A forward that takes the doubled batch apart, runs the passes, and puts their results in its place."""
    original, signature = model.forward, inspect.signature(model.forward)
    name = next(iter(signature.parameters))  # sample or hidden_states: x_t

    @functools.wraps(original)  # pipelines look at the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        batch = len(signature.bind(*args, **kwargs).arguments[name])
        without, worded = _halves(signature.bind(*args, **kwargs).arguments[name], wordless)

        def run(number: int | None, rows: slice) -> Any:
            turn.number = number
            try:
                return original(*_rows(args, rows, batch), **_rows(kwargs, rows, batch))
            finally:
                turn.number = None

        wanted = [run(number, worded) for number in range(count)]
        free = [run(number, without) for number in range(count)] if blank == OWN else [run(None, without)]
        parts = [_mean(free), _mean(wanted)]
        return _like(wanted[0], torch.cat(parts if wordless == "first" else parts[::-1]))

    return forward


def _halves(value: Tensor, wordless: str) -> tuple[slice, slice]:
    """Rows without words and rows with them, of a batch that holds everything twice."""
    half = len(value) // 2
    if len(value) % 2 or not torch.equal(value[:half], value[half:]):
        raise IncompatibleAdapters(
            f"adapters are composed in a doubled batch, half of it without words; found a batch of {len(value)} that is"
            " not doubled: say a guidance scale above 1, or fuse by their sum"
        )
    first, second = slice(half), slice(half, None)
    return (first, second) if wordless == "first" else (second, first)


def _rows(value: Any, rows: slice, batch: int) -> Any:
    """These rows of every tensor in a tree of arguments that has one for each picture; the rest as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _rows(one, rows, batch) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(one, rows, batch) for one in value)
    return value


def _mean(results: Sequence[Any]) -> Tensor:
    first: Tensor = results[0][0]
    return first if len(results) == 1 else torch.stack([one[0] for one in results]).mean(dim=0)


def _like(result: Any, value: Tensor) -> Any:
    """A result of the model with another prediction: a tuple, or diffusers' output of one field."""
    return (value,) if isinstance(result, tuple) else type(result)(value)
