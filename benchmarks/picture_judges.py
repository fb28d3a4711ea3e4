"""Judges of painted pictures: small convolutional nets that learn from real pictures alone.

What a judge sees is what its caller hands over; for a fair verdict hand over

    style       pictures of names that neither the base nor an adapter has seen, plain and in every style, in several
                colourings (`styled(..., recoloured=True)`, one call a seed)
    content     pictures by other artists than the base's and the adapters', plain and in every style (see `styled`)
    matcher     the same things drawn by two artists other than the base's; `crossed_ranks` asks each matcher only about
                names that it was not taught, so neither a queried name nor the queries' artist was in its training

No judge sees a sample of any model. All of them learn from shifted, mirrored, blurred and noisy pictures, since samples
of a diffusion model are never quite clean. Randomness comes from the seeds; the global random state is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from picture_moves import shifted
from picture_styles import STYLES, restyled
from torch import Tensor, nn
from torch.nn import functional

Pictures = NDArray[np.uint8]  # (n, 32, 32, 3)
Numbers = NDArray[np.int64]
BATCH = 64
RATE = 4e-3
WARM_UP = 0.15  # share of the steps
TEMPERATURE = 0.1
PLAIN = "plain"
STYLE_CLASSES: tuple[str, ...] = (PLAIN, *(style.name for style in STYLES))


@dataclass(frozen=True)
class Disturbance:
    """What happens to a picture by chance before a judge in training sees it."""

    shift: int = 2  # pixels to every side
    noise: float = 0.08  # largest deviation, of pixels and of blocks of 4 x 4, where a picture spans 0 to 1
    blur: float = 0.5  # share of the pictures that are blurred
    colour: float = 0.0  # largest change of each channel's brightness and contrast; 0 where colour is what is judged
    grey: float = 0.0  # share of the pictures that lose their colour

    def __call__(self, pictures: Tensor, mirror: Tensor, chance: torch.Generator) -> Tensor:
        """Pictures (n, 3, 32, 32) of 0 to 1, disturbed; `mirror` (n,) tells which may be seen in a mirror."""
        turned = mirror & (_draw(chance, len(pictures)) < 0.5)
        pictures = torch.where(_each(turned), pictures.flip(-1), pictures)
        pictures = self._coloured(shifted(pictures, self.shift, chance), chance)
        soft = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        strength = _draw(chance, len(pictures)) * (_draw(chance, len(pictures)) < self.blur)
        pictures = torch.lerp(pictures, soft, _each(strength))
        fine = torch.randn(pictures.shape, generator=chance)
        coarse = torch.randn((*pictures.shape[:2], 8, 8), generator=chance).repeat_interleave(4, 2)
        grain = torch.lerp(fine, coarse.repeat_interleave(4, 3), _each(0.5 * _draw(chance, len(pictures))))
        return pictures + grain * _each(self.noise * _draw(chance, len(pictures)))

    def _coloured(self, pictures: Tensor, chance: torch.Generator) -> Tensor:
        if not self.colour and not self.grey:
            return pictures
        shape = (2, len(pictures), 3, 1, 1)
        gain, offset = (torch.rand(shape, generator=chance) * 2 - 1) * self.colour
        pictures = (pictures - 0.5) * (1 + gain) + 0.5 + 0.5 * offset
        lost = _each(_draw(chance, len(pictures)) < self.grey)
        return torch.where(lost, pictures.mean(dim=1, keepdim=True), pictures)


STYLE_DISTURBANCE = Disturbance()
CONTENT_DISTURBANCE = Disturbance(shift=3, colour=0.25, grey=0.1)
MATCHER_DISTURBANCE = Disturbance(shift=3, colour=0.2, grey=0.05)


@dataclass(frozen=True)
class Judge:
    """A trained classifier of pictures."""

    classes: tuple[str, ...]
    net: nn.Module

    def probabilities(self, pictures: Pictures) -> NDArray[np.float32]:
        """Of every class, for each picture: (n, classes)."""
        return torch.softmax(_seen(self.net, pictures), dim=1).numpy()

    def accuracy(self, pictures: Pictures, labels: NDArray[Any]) -> float:
        """Share of the pictures whose likeliest class is their label, a number of a class: (n,)."""
        return float(np.mean(self.probabilities(pictures).argmax(axis=1) == np.asarray(labels)))


@dataclass(frozen=True)
class Matcher:
    """A trained eye for the same thing drawn by different hands."""

    net: nn.Module

    def vectors(self, pictures: Pictures) -> NDArray[np.float32]:
        """Unit vectors (n, 128): cosines say how alike two pictures' things are."""
        return functional.normalize(_seen(self.net, pictures), dim=1).numpy()

    def ranks(self, queries: Pictures, references: Pictures, own: Numbers) -> Numbers:
        """For each query, how many references are at least as like it as its own, references[own[i]]; 0 is a hit."""
        likeness = self.vectors(queries) @ self.vectors(references).T
        behind = likeness < likeness[np.arange(len(queries)), own][:, None]
        return np.asarray(len(references) - 1 - behind.sum(axis=1))


def styled(
    rgba: NDArray[np.uint8],
    plain: Pictures,
    each: int,
    seed: int,
    styles: Sequence[str] | None = None,
    recoloured: bool = False,
) -> tuple[Pictures, Numbers, Numbers]:
    """Pictures (n, 64, 64, 4), plain (n, 32, 32, 3) and in `each` different styles drawn for each, of `styles` or all.

    recoloured: red, green and blue of every subject change places by chance before it is painted, for a style judge
    that must not take a blue thing for a blue style. Other seeds give other colours and other chance in the styles.
    Returns pictures (n + n each, 32, 32, 3), the numbers of their STYLE_CLASSES and the rows that they come from.
    """
    chance = np.random.default_rng(seed)
    wanted = [number for number, style in enumerate(STYLES) if styles is None or style.name in styles]
    drawn = np.stack([chance.permutation(wanted)[:each] for _ in rgba])
    if recoloured:
        order = chance.permuted(np.tile(np.arange(3), (len(rgba), 1)), axis=1)[:, None, None, :]
        rgba = np.concatenate([np.take_along_axis(rgba[..., :3], order, axis=3), rgba[..., 3:]], axis=3)
        plain = np.take_along_axis(plain, order, axis=3)
    parts = [(plain, np.zeros(len(rgba), np.int64), np.arange(len(rgba)))]
    for number in wanted:
        rows = np.flatnonzero((drawn == number).any(axis=1))
        if len(rows):
            painted = restyled(STYLES[number], rgba[rows], rows + seed * len(rgba))
            parts.append((painted, np.full(len(rows), number + 1), rows))
    pictures, labels, origins = zip(*parts, strict=True)
    return np.concatenate(pictures), np.concatenate(labels), np.concatenate(origins)


def train_judge(
    pictures: Pictures,
    labels: NDArray[Any],
    classes: Sequence[str],
    seed: int,
    steps: int = 1200,
    disturbance: Disturbance = STYLE_DISTURBANCE,
    mirror: NDArray[np.bool_] | None = None,
) -> Judge:
    """A classifier of pictures (n, 32, 32, 3) whose classes are numbered by `labels` (n,).

    A class is shown as often as the fourth root of its count says, so the rare nearly as often as the common. `mirror`
    (n,): which pictures may be shown in a mirror, by default none.
    """
    numbers = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    if len(numbers) != len(pictures) or int(numbers.max()) >= len(classes):
        raise ValueError(f"{len(pictures)} pictures and {len(numbers)} labels of {len(classes)} classes do not fit")
    often = numbers.bincount(minlength=len(classes)).double()[numbers] ** -0.75
    images, turns = _images(pictures), _mirrors(mirror, len(pictures))

    def loss(net: nn.Module, chance: torch.Generator) -> Tensor:
        rows = torch.multinomial(often, BATCH, replacement=True, generator=chance)
        shown = disturbance(images[rows].float() / 255, turns[rows], chance)
        return functional.cross_entropy(_under(net, shown), numbers[rows], label_smoothing=0.05)

    return Judge(tuple(classes), _trained(loss, len(classes), seed, steps))


def kept(place: Path | None, make: Callable[[], Judge]) -> Judge:
    """The judge in a file; made, and kept there, where there is no such file. None keeps nothing."""
    if place is None:
        return make()
    if place.exists():
        state = torch.load(place, weights_only=True)
        net = _net(len(state["classes"]))
        net.load_state_dict(state["net"])
        return Judge(tuple(state["classes"]), net.eval().requires_grad_(False))
    judge = make()
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"classes": list(judge.classes), "net": judge.net.state_dict()}, place.with_suffix(".part"))
    place.with_suffix(".part").rename(place)
    return judge


def train_matcher(
    views: Sequence[Pictures], seed: int, steps: int = 600, mirror: NDArray[np.bool_] | None = None
) -> Matcher:
    """Learns which pictures show the same thing: views[a][i] is artist a's picture of name i, for two artists or more.

    Each step draws names and two artists for each; a picture must tell its partner from those of the other names
    (InfoNCE in both directions).
    """
    images, turns = torch.stack([_images(view) for view in views]), _mirrors(mirror, len(views[0]))
    size = min(BATCH, images.shape[1])

    def loss(net: nn.Module, chance: torch.Generator) -> Tensor:
        rows = torch.randperm(images.shape[1], generator=chance)[:size]
        artists = torch.rand((size, len(views)), generator=chance).argsort(dim=1)[:, :2].T
        # a mirror image's partner may be either way round, so both sides are turned or not by their own chance
        shown = MATCHER_DISTURBANCE(images[artists, rows].flatten(0, 1).float() / 255, turns[rows].repeat(2), chance)
        vectors = functional.normalize(_under(net, shown), dim=1)
        likeness = vectors[:size] @ vectors[size:].T / TEMPERATURE
        partner = torch.arange(size)
        return functional.cross_entropy(likeness, partner) + functional.cross_entropy(likeness.T, partner)

    return Matcher(_trained(loss, 128, seed, steps))


def crossed_ranks(
    queries: Sequence[tuple[Pictures, Numbers]],
    references: Pictures,
    views: Sequence[Pictures],
    seed: int,
    steps: int = 600,
    mirror: NDArray[np.bool_] | None = None,
) -> list[Numbers]:
    """Ranks of queries among `references` (n, 32, 32, 3), one real picture a name; 0: the nearest is its own name's.

    queries: pictures with the numbers of the names that they should show, for example samples, another artist's real
    pictures (the ceiling) and noise (the floor). views: as for `train_matcher`, of the same n names. The names are
    dealt into two halves; a matcher is taught each half and asked about the other, among the references of all names.
    """
    half = np.random.default_rng(seed).permutation(len(references)) % 2
    ranks = [np.zeros(len(own), dtype=np.int64) for _, own in queries]
    for asked in (0, 1):
        taught = half != asked
        turns = None if mirror is None else mirror[taught]
        matcher = train_matcher([view[taught] for view in views], seed + asked, steps, turns)
        for found, (pictures, own) in zip(ranks, queries, strict=True):
            mine = half[own] == asked
            if mine.any():
                found[mine] = matcher.ranks(pictures[mine], references, own[mine])
    return ranks


def top(ranks: Numbers, count: int) -> float:
    """Share of the ranks among the first `count`."""
    return float(np.mean(ranks < count))


def _net(outputs: int) -> nn.Sequential:
    """Pictures (n, 3, 32, 32) to outputs (n, outputs); about 0.5 million weights."""
    layers: list[nn.Module] = []
    for inner, outer, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 192, 2)):
        layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    # places matter to what is shown, so the last 4 x 4 are not merely averaged
    layers += [nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(192 * 4, outputs)]
    return nn.Sequential(*layers)


def _trained(loss: Callable[[nn.Module, torch.Generator], Tensor], outputs: int, seed: int, steps: int) -> nn.Module:
    chance = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # first weights, and dropout
        net = _net(outputs).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.05)
        pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=WARM_UP)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(loss(net, chance))
            optimizer.step()
            pace.step()
    return net.eval().requires_grad_(False)


def _under(net: nn.Module, shown: Tensor) -> Tensor:
    """The net's outputs in training, computed in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        outputs: Tensor = net((shown * 2 - 1).contiguous(memory_format=torch.channels_last))
    return outputs.float()


@torch.inference_mode()
def _seen(net: nn.Module, pictures: Pictures) -> Tensor:
    parts = [net(part.float() / 127.5 - 1) for part in torch.split(_images(pictures), 512)]
    return torch.cat(parts).clone()


def _images(pictures: Pictures) -> Tensor:
    if pictures.dtype != np.uint8 or pictures.shape[1:] != (32, 32, 3):
        raise ValueError(f"pictures are uint8 (n, 32, 32, 3), found {pictures.dtype} {pictures.shape}")
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)


def _mirrors(mirror: NDArray[np.bool_] | None, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool) if mirror is None else torch.from_numpy(np.asarray(mirror, dtype=bool))


def _draw(chance: torch.Generator, count: int) -> Tensor:
    return torch.rand(count, generator=chance)


def _each(values: Tensor) -> Tensor:
    """One value for each picture, to be spread over its pixels."""
    return values[:, None, None, None]
