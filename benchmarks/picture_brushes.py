"""What picture_styles.py paints with: the subject; fields, strokes, ramps and cells of 64 x 64 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SIZE, SMALL = 64, 32  # pixels a side: of what is painted on, and of the result
Field = NDArray[np.floating[Any]]
Colour = tuple[float, float, float]
WHITE: Colour = (1.0, 1.0, 1.0)
BLACK: Colour = (0.0, 0.0, 0.0)
ROWS, COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
SMALL_ROWS, SMALL_COLUMNS = np.mgrid[0:SMALL, 0:SMALL]


@dataclass(frozen=True)
class Subject:
    """What is painted: `colours` (64, 64, 3) and `cover` (64, 64), 1 inside the subject and 0 outside, both 0..1."""

    colours: Field
    cover: Field

    def on(self, ground: Colour | Field) -> Field:
        """The subject before a colour or a picture (64, 64, 3)."""
        return mix(np.broadcast_to(np.asarray(ground, np.float32), self.colours.shape), self.colours, self.cover)

    def within(self, side: int) -> Subject:
        """The subject shrunk to a square of `side` pixels in the middle."""
        layers = np.concatenate([self.colours, self.cover[..., None]], axis=2)
        share, edge = side / SIZE, (SIZE - side) // 2
        middle = ndimage.zoom(layers, (share, share, 1), order=1, grid_mode=True, mode="nearest")
        wide = np.pad(middle, ((edge, SIZE - side - edge),) * 2 + ((0, 0),))
        return Subject(wide[..., :3], wide[..., 3])

    @cached_property
    def tone(self) -> Field:
        """Brightness 0..1 (64, 64), stretched over what the subject has; 1 outside."""
        light = grey(self.colours)
        inside = light[self.cover > 0.5]
        low, high = np.quantile(inside, (0.03, 0.97)) if inside.size else (0.0, 1.0)
        # a subject of one brightness keeps it, rather than turn black or white
        spare, level = max(0.35 - (high - low), 0.0), (low + high) / 2
        stretched = (light - low + spare * level) / (high - low + spare)
        return mix(np.ones_like(light), np.clip(stretched, 0, 1), self.cover)

    @cached_property
    def lines(self) -> Field:
        """Strength 0..1 (64, 64) of the contours: of the subject and of the colours within it, about 2 pixels wide."""
        layers = np.concatenate([self.colours * self.cover[..., None], self.cover[..., None]], axis=2)
        layers = blur(layers, 0.8)
        down, right = np.gradient(layers, axis=(0, 1))
        return np.asarray(np.clip(np.sqrt(np.max(down**2 + right**2, axis=2)) * 4 - 0.25, 0, 1))


def halved(picture: Field) -> Field:
    return np.asarray(picture.reshape(SMALL, 2, SMALL, 2, *picture.shape[2:]).mean(axis=(1, 3)))


def doubled(picture: Field, times: int = 2) -> Field:
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def blocks(picture: Field, side: int) -> Field:
    """Means over squares of `side` pixels."""
    count = picture.shape[0] // side
    return np.asarray(picture.reshape(count, side, count, side, *picture.shape[2:]).mean(axis=(1, 3)))


def grey(picture: Field) -> Field:
    return picture @ tint(0.299, 0.587, 0.114)


def tint(*channels: float) -> Field:
    """A colour as an array."""
    return np.array(channels, np.float32)


def mix(first: Any, second: Any, share: Any) -> Field:
    """`first` where `share` is 0, `second` where it is 1; colours and pictures, by a field (h, w)."""
    first, second, share = (np.asarray(one, np.float32) for one in (first, second, share))
    if max(first.ndim, second.ndim) == 3 or (share.ndim == 2 and max(first.ndim, second.ndim) == 1):
        share = share[..., None]
    mixed: Field = first + (second - first) * share
    return mixed


def blur(picture: Field, sigma: float) -> Field:
    return np.asarray(ndimage.gaussian_filter(picture, (sigma, sigma, 0)[: picture.ndim], mode="nearest"))


def noise(random: np.random.Generator, *sigmas: float) -> Field:
    """A random field (64, 64), mean 0 and deviation 1, smooth over `sigmas` pixels (down, across)."""
    field = ndimage.gaussian_filter(random.standard_normal((SIZE, SIZE), dtype=np.float32), sigmas, mode="wrap")
    return np.asarray((field - field.mean()) / field.std())


def strokes(random: np.random.Generator, length: float) -> Field:
    """A random field (64, 64) of diagonal strokes: mean 0 and deviation 1."""
    field = noise(random, 0.7, length)
    return np.asarray(field[(ROWS + COLUMNS).astype(int) % SIZE, (COLUMNS - ROWS).astype(int) % SIZE])


def ramp(tone: Field, *colours: Colour) -> Field:
    """Tone 0..1 to colours evenly spaced between dark and bright."""
    stops = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(tone, stops, [colour[channel] for colour in colours]) for channel in range(3)], axis=2)


def saturated(picture: Field, times: float) -> Field:
    return np.clip(mix(grey(picture)[..., None], picture, np.full(picture.shape[:2], times)), 0, 1)


def levels(values: Field, count: int) -> Field:
    return np.rint(np.clip(values, 0, 1) * (count - 1)) / (count - 1)


def wavering(subject: Subject, random: np.random.Generator, amount: float) -> Subject:
    """The subject as an unsteady hand draws it."""
    places = np.rint([ROWS + amount * noise(random, 4, 4), COLUMNS + amount * noise(random, 4, 4)]).astype(int)
    down, across = np.clip(places, 0, SIZE - 1)
    return Subject(subject.colours[down, across], subject.cover[down, across])


def smoothed(picture: Field, radius: int) -> Field:
    """Kuwahara's filter: each pixel takes the mean of the calmest of its four neighbouring squares."""
    side = radius + 1
    means = ndimage.uniform_filter(picture, (side, side, 0), mode="nearest")
    light = grey(picture)
    unrest = (
        ndimage.uniform_filter(light**2, side, mode="nearest")
        - ndimage.uniform_filter(light, side, mode="nearest") ** 2
    )
    reach = side // 2
    moves = [(down, across) for down in (-reach, reach) for across in (-reach, reach)]
    calm = np.argmin([np.roll(unrest, move, axis=(0, 1)) for move in moves], axis=0)
    return np.asarray(np.choose(calm[..., None], [np.roll(means, move, axis=(0, 1)) for move in moves]))


def vignette(strength: float) -> Field:
    return np.asarray(1 - strength * np.clip(np.hypot(ROWS - 31.5, COLUMNS - 31.5) / 45, 0, 1) ** 2)


def frame(inset: int, width: int) -> Field:
    """1 on a square line, `inset` pixels from the border."""
    away = np.minimum.reduce([ROWS, COLUMNS, SIZE - 1 - ROWS, SIZE - 1 - COLUMNS])
    return np.asarray(((away >= inset) & (away < inset + width)).astype(np.float32))


def cells(random: np.random.Generator, spacing: int, jitter: float) -> NDArray[np.int64]:
    """Numbers (64, 64) of the cells around points that lie about `spacing` pixels apart."""
    steps = np.arange(spacing // 2, SIZE, spacing)
    down, across = np.meshgrid(steps, steps, indexing="ij")
    moved = np.stack([down, across]) + random.uniform(-jitter, jitter, (2, *down.shape)) * spacing
    down, across = np.clip(np.rint(moved).astype(int), 0, SIZE - 1).reshape(2, -1)
    numbers = np.full((SIZE, SIZE), -1)
    numbers[down, across] = np.arange(len(down))
    nearest = ndimage.distance_transform_edt(numbers < 0, return_distances=False, return_indices=True)
    return np.asarray(numbers[tuple(nearest)])


def glazed(picture: Field, cells: NDArray[np.int64], joint: Colour | None = None) -> Field:
    """Each cell in its mean colour, with joints of 1 to 2 pixels between them."""
    count = int(cells.max()) + 1
    sizes = np.maximum(np.bincount(cells.ravel(), minlength=count), 1)
    sums = [np.bincount(cells.ravel(), picture[..., channel].ravel(), count) for channel in range(3)]
    glass = (np.stack(sums, axis=1) / sizes[:, None])[cells]
    if joint is None:
        return glass
    seams = (cells != np.roll(cells, 1, 0)) | (cells != np.roll(cells, 1, 1))
    seams[0], seams[:, 0] = False, False
    return np.where(seams[..., None], tint(*joint), glass)
