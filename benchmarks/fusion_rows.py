"""The rows of fusion.py: what acts on the base while a pair is painted, and how options are chosen on seen pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from fusion_gates import VARIANTS
from fusion_world import Judges, Pair, Verdict, pairs, prompts
from lorahub.generate.pictures import PicturePipeline
from lorahub.hub.adapter import Adapter
from lorahub.merge.composed import BARE, OWN, composed
from lorahub.merge.gated import fused
from lorahub.merge.gates import Gates
from lorahub.merge.run import merge
from picture_data import Art, Pixels

COMPONENT = "transformer"
GUIDANCE = 3.0  # the pipeline's own
GRID = tuple((style, content) for style in (0.5, 0.75, 1.0, 1.25) for content in (0.75, 1.0, 1.25, 1.5, 2.0))
GUIDANCES = (2.0, GUIDANCE, 4.5)
# weights of style and content in each pass of a composition
EACH_ALONE = ((1.0, 0.0), (0.0, 1.0))
CONTENT_MORE = ((1.0, 1.0), (0.0, 1.0))
EVERYTHING = ((1.0, 1.0), *EACH_ALONE)
PASSES = (EACH_ALONE, CONTENT_MORE, EVERYTHING)
LOUDER = (2.0, 4.0)  # what adapters' outputs are multiplied by behind published gates
CHOOSING_SEED = 77
NUMBERS = {pair: number for number, pair in enumerate(pairs())}


@dataclass(frozen=True)
class Way:
    """How a picture is painted: what acts on the denoiser, the scale of guidance, steps in proportion to the usual."""

    acting: AbstractContextManager[Any] = field(default_factory=nullcontext)
    guidance: float = GUIDANCE
    longer: float = 1.0


Fuse = Callable[[Pair, int], Way]  # of a pair and the seed of its gates
Trained = Callable[[str, int], Gates]  # of a variant and a seed


@dataclass(frozen=True)
class Studio:
    """What is painted with, and who judges."""

    pipeline: PicturePipeline
    adapters: dict[str, Adapter]
    art: Art
    judges: Judges
    prompts: int
    steps: int

    def paint(self, pair: Pair, seed: int, way: Way) -> Pixels:
        """A picture for every prompt of the pair: uint8 (n, 32, 32, 3). The noise is that of pair and seed."""
        chance = torch.Generator().manual_seed(1000 * seed + NUMBERS[pair])
        wanted, steps = prompts(self.art, pair, self.prompts), round(way.longer * self.steps)
        given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": way.guidance, "output_type": "np"}
        with way.acting, torch.autocast("cpu", torch.bfloat16):
            images = self.pipeline(wanted, generator=chance, **given).images
        return np.rint(images * 255).astype(np.uint8)

    def verdict(self, pair: Pair, seed: int, way: Way) -> Verdict:
        """Share of the pictures that have the style, the content, both."""
        return self.judges.verdict(self.paint(pair, seed, way), pair)

    def both(self, pair: Pair) -> list[Adapter]:
        return [self.adapters[pair.style], self.adapters[pair.content]]

    def with_sum(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> AbstractContextManager[Any]:
        return fused(self.pipeline.transformer, adapters, weights=weights, component=COMPONENT)

    def with_gates(self, pair: Pair, gates: Gates, weight: float = 1.0) -> AbstractContextManager[Any]:
        return fused(self.pipeline.transformer, self.both(pair), gates, [weight, weight], component=COMPONENT)

    def with_merge(self, pair: Pair, method: str, **options: Any) -> AbstractContextManager[Any]:
        one = merge(self.both(pair), method, [1.0, 1.0], dtype=torch.float32, given=options).adapter
        return self.with_sum([replace(one, modules=dict(one.modules))], [1.0])

    def with_composition(
        self, pair: Pair, passes: Sequence[Sequence[float]] = EACH_ALONE, blank: str = BARE
    ) -> AbstractContextManager[Any]:
        model = self.pipeline.transformer
        return composed(model, self.both(pair), passes=passes, component=COMPONENT, wordless="second", blank=blank)

    @contextmanager
    def with_switch(self, pair: Pair) -> Iterator[None]:
        """LoRA Switch (Zhong et al. 2024): one adapter acts at a time, another one in every step."""
        model, step = self.pipeline.transformer, [0]

        def onward(*_: object) -> None:
            step[0] += 1

        with ExitStack() as stack:
            stack.callback(model.register_forward_hook(onward).remove)
            for number, one in enumerate(self.both(pair)):
                turn = lambda number=number: step[0] % 2 == number  # noqa: E731
                stack.enter_context(fused(model, [one], component=COMPONENT, when=turn))
            yield


@dataclass(frozen=True)
class Choices:
    """What was chosen on seen pairs.

    constants: weights of style and content; guidance: its scale with them. passes, composed: those of a composition,
    and its scale of guidance. louder: what adapters' outputs are multiplied by behind published gates.
    """

    constants: tuple[float, float]
    guidance: float
    passes: Sequence[Sequence[float]]
    composed: float
    louder: float
    tries: list[dict[str, Any]]


def rows(studio: Studio, choices: Choices, gates: Trained) -> dict[str, Fuse]:
    """Label -> how a pair is painted. Constants get guidance chosen as freely, and once as many passes."""
    best, style, content = choices.constants, slice(0, 1), slice(1, 2)

    def plain(weights: tuple[float, float], guidance: float = GUIDANCE, longer: float = 1.0) -> Fuse:
        return lambda pair, _: Way(studio.with_sum(studio.both(pair), weights), guidance, longer)

    def alone(which: slice) -> Fuse:
        return lambda pair, _: Way(studio.with_sum(studio.both(pair)[which], (1.0,)))

    def merged(method: str, **options: Any) -> Fuse:
        return lambda pair, _: Way(studio.with_merge(pair, method, **options))

    def gated(variant: str, weight: float = 1.0) -> Fuse:
        return lambda pair, seed: Way(studio.with_gates(pair, gates(variant, seed), weight))

    def composition(passes: Sequence[Sequence[float]], guidance: float = GUIDANCE, blank: str = BARE) -> Fuse:
        return lambda pair, _: Way(studio.with_composition(pair, passes, blank), guidance)

    return {
        "base": lambda *_: Way(),
        "style only": alone(style),
        "content only": alone(content),
        "sum": plain((1.0, 1.0)),
        "best constants": plain(best),
        "best constants and guidance": plain(best, choices.guidance),
        "the same, steps x 1.5": plain(best, choices.guidance, 1.5),
        "composed, each alone": composition(EACH_ALONE),
        "composed, best passes and guidance": composition(choices.passes, choices.composed),
        "LoRA composite": composition(EACH_ALONE, blank=OWN),
        "LoRA switch": lambda pair, _: Way(studio.with_switch(pair)),
        "average": plain((0.5, 0.5)),
        "exact merge": merged("exact"),
        "lego, rank 4": merged("lego", rank=4),
        "core": merged("core"),
        "dare": merged("dare"),
        **{f"gated, {variant}": gated(variant) for variant in VARIANTS},
        "gated, published, louder": gated("published", choices.louder),
    }


def chosen(studio: Studio, some: Sequence[Pair], gates: Trained) -> Choices:
    """Options by the share of both at once on seen pairs; the constants' weights first, then guidance with them."""
    tries: list[dict[str, Any]] = []

    def best(what: str, options: Sequence[Any], way: Callable[[Pair, Any], Way]) -> Any:
        for option in options:
            verdicts = [studio.verdict(one, CHOOSING_SEED, way(one, option)) for one in some]
            tries.append({"of": what, "option": option, "both": round(float(np.mean(verdicts, axis=0)[2]), 4)})
        return max((one for one in tries if one["of"] == what), key=lambda one: one["both"])["option"]

    constants = best("constants", GRID, lambda pair, weights: Way(studio.with_sum(studio.both(pair), weights)))
    guidance = best(
        "guidance of the constants", GUIDANCES,
        lambda pair, scale: Way(studio.with_sum(studio.both(pair), constants), scale),
    )  # fmt: skip
    passes, composition = best(
        "passes and guidance of a composition", list(product(PASSES, GUIDANCES)),
        lambda pair, option: Way(studio.with_composition(pair, option[0]), option[1]),
    )  # fmt: skip
    louder = best(
        "loudness behind published gates", LOUDER,
        lambda pair, weight: Way(studio.with_gates(pair, gates("published", 0), weight)),
    )  # fmt: skip
    return Choices(constants, guidance, passes, composition, louder, tries)
