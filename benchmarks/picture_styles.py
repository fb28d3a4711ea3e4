"""Styles that are computed from a picture, so that every style of the picture world has paired truth for its judge.

A painter turns a subject (colours and coverage, 64 x 64) into a picture of 64 x 64 or 32 x 32; `Style.apply` reduces it
to 32 x 32. What is random (grain, cells, tears) is drawn from the style's name and the picture's index alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from picture_brushes import (
    BLACK,
    COLUMNS,
    ROWS,
    SIZE,
    SMALL,
    WHITE,
    Colour,
    Field,
    Subject,
    blocks,
    blur,
    cells,
    doubled,
    frame,
    glazed,
    grey,
    halved,
    levels,
    mix,
    noise,
    ramp,
    saturated,
    smoothed,
    strokes,
    tint,
    vignette,
    wavering,
)
from scipy import ndimage

Painter = Callable[[Subject, np.random.Generator], Field]


@dataclass(frozen=True)
class Style:
    """A way to paint. `apply(picture, index)`: RGBA (64, 64, 4), uint8 or float 0..1, to RGB uint8 (32, 32, 3);
    `index` is the picture's number, from which all that is random in it is drawn."""

    name: str
    description: str
    trigger: str
    apply: Callable[[NDArray[Any], int], NDArray[np.uint8]]


def restyled(style: Style, pictures: NDArray[Any], indices: Iterable[int] | None = None) -> NDArray[np.uint8]:
    """All of `pictures` (n, 64, 64, 4) in a style: uint8 (n, 32, 32, 3). `indices`: their numbers, else 0, 1 ..."""
    numbers = range(len(pictures)) if indices is None else indices
    return np.stack([style.apply(picture, number) for picture, number in zip(pictures, numbers, strict=True)])


def _apply(paint: Painter, name: str, picture: NDArray[Any], index: int) -> Any:
    if picture.shape != (SIZE, SIZE, 4):
        raise ValueError(f"a picture is {(SIZE, SIZE, 4)}, found {picture.shape}")
    values = picture.astype(np.float32) / (255 if picture.dtype == np.uint8 else 1)
    subject = Subject(np.where(values[..., 3:] > 0, values[..., :3], np.float32(1)), values[..., 3])
    painted = paint(subject, np.random.default_rng((zlib.crc32(name.encode()), index)))
    small = painted if painted.shape[0] == SMALL else halved(painted)
    return np.rint(np.clip(small, 0, 1) * 255).astype(np.uint8)


def _watercolor(subject: Subject, random: np.random.Generator) -> Field:
    wet = wavering(subject, random, 1.1)
    cover, pigment = blur(wet.cover, 0.9), blur(wet.on(WHITE), 0.9)
    pools = np.clip(0.68 + 0.24 * noise(random, 5, 5), 0.3, 1)
    rim = np.clip(cover - blur(cover, 3), 0, 1) * 1.3
    washed = 1 - (1 - saturated(pigment, 1.4)) * pools[..., None] * (1 + rim[..., None])
    return np.asarray(washed * tint(1.0, 0.985, 0.94) + 0.018 * noise(random, 0.6, 0.6)[..., None])


def _pencil_sketch(subject: Subject, random: np.random.Generator) -> Field:
    hatching = 0.5 + 0.5 * np.sin((ROWS + COLUMNS) * np.pi / 2.83)
    shade = np.clip(0.85 - subject.tone, 0, 1) * 0.75 * hatching
    graphite = np.clip(subject.lines * (0.85 + 0.2 * noise(random, 1, 1)), 0, 1) * 0.85
    return ramp(0.97 - np.maximum(graphite, shade), (0.12, 0.12, 0.14), (0.97, 0.97, 0.96))


def _pixel_art(subject: Subject, random: np.random.Generator) -> Field:
    cover = blocks(subject.cover, 4)
    colours = blocks(subject.colours * subject.cover[..., None], 4) / np.maximum(cover, 0.01)[..., None]
    solid = cover > 0.3
    edge = ndimage.binary_dilation(solid) & ~solid
    sprite = np.where(solid[..., None], levels(saturated(colours, 1.3), 4), tint(0.55, 0.85, 0.95))
    return doubled(np.where(edge[..., None], tint(0.1, 0.1, 0.2), sprite))


def _blueprint(subject: Subject, random: np.random.Generator) -> Field:
    grid = np.where((ROWS % 16 < 2) | (COLUMNS % 16 < 2), 0.18, 0.0)
    return mix((0.09, 0.24, 0.62), (0.95, 0.98, 1.0), np.maximum(grid, np.clip(subject.lines * 1.5, 0, 1)))


def _neon(subject: Subject, random: np.random.Generator) -> Field:
    hue = subject.colours / np.maximum(subject.colours.max(axis=2, keepdims=True), 0.05)
    dull = (np.ptp(hue, axis=2) < 0.2)[..., None]
    tubes = np.where(dull, tint(0.1, 0.9, 1.0), np.clip(saturated(hue, 2.2), 0, 1))
    light = tubes * np.clip(subject.lines * 1.3, 0, 1)[..., None]
    return np.asarray(tint(0.03, 0.01, 0.07) + light + 1.1 * blur(light, 3) + 0.35 * subject.lines[..., None] ** 3)


def _sepia(subject: Subject, random: np.random.Generator) -> Field:
    light = 0.5 * grey(subject.on(WHITE)) + 0.5 * subject.tone
    tone = np.clip(0.05 + 0.85 * light * vignette(0.5), 0, 1) + 0.02 * noise(random, 0.6, 0.6)
    return ramp(tone, (0.12, 0.05, 0.01), (0.6, 0.4, 0.2), (1.0, 0.93, 0.76))


def _oil_painting(subject: Subject, random: np.random.Generator) -> Field:
    bristles = strokes(random, 5)
    ground = ramp(
        0.5 + 0.2 * bristles + 0.15 * noise(random, 8, 8), (0.25, 0.2, 0.12), (0.5, 0.42, 0.25), (0.7, 0.62, 0.42)
    )
    hand = wavering(subject, random, 0.8)
    dabs = smoothed(saturated(hand.on(ground), 1.4), 2)
    return dabs * (1 + 0.1 * bristles[..., None])


def _stained_glass(subject: Subject, random: np.random.Generator) -> Field:
    sky = ramp(ROWS / SIZE, (0.45, 0.7, 0.95), (0.75, 0.85, 0.6))
    pieces = cells(random, 13, 0.3) * 2 + (subject.cover > 0.5)
    glass = glazed(saturated(subject.on(sky), 1.7), pieces, BLACK)
    return np.asarray(glass * (1 - np.clip(subject.lines * 1.2, 0, 1))[..., None])


def _mosaic(subject: Subject, random: np.random.Generator) -> Field:
    tiles = (ROWS // 6 * 11 + COLUMNS // 6).astype(np.int64)
    stone = saturated(subject.on((0.13, 0.33, 0.38)), 1.5)
    shades = random.uniform(0.8, 1.1, 11 * 11).astype(np.float32)[tiles]
    joints = np.maximum(ROWS % 6 > 3, COLUMNS % 6 > 3)
    return mix(glazed(stone, tiles, None) * shades[..., None], (0.96, 0.93, 0.86), joints * np.float32(0.5))


def _halftone(subject: Subject, random: np.random.Generator) -> Field:
    across, down = (ROWS + COLUMNS) * np.pi / 8, (ROWS - COLUMNS) * np.pi / 8
    screen = 0.5 + 0.25 * (np.cos(across) + np.cos(down))
    tone = 0.12 + 0.85 * subject.tone**0.6
    ink = np.clip((screen - tone) * 5 + 0.5, 0, 1)
    return mix((0.91, 0.88, 0.8), (0.1, 0.1, 0.1), np.maximum(ink, subject.lines * 0.7))


def _pop_art(subject: Subject, random: np.random.Generator) -> Field:
    grounds: tuple[Colour, ...] = ((0.0, 0.75, 0.8), (1.0, 0.9, 0.0), (0.55, 0.85, 0.1))
    inks: tuple[Colour, ...] = ((0.25, 0.0, 0.5), (0.9, 0.0, 0.5), (1.0, 0.45, 0.1), (1.0, 0.85, 0.7))
    printed = ramp(levels(subject.tone, 4), *inks)
    cover = (blur(subject.cover, 0.7) > 0.5).astype(np.float32)
    return mix(grounds[int(random.integers(3))], printed, cover)


def _charcoal(subject: Subject, random: np.random.Generator) -> Field:
    hand = wavering(subject, random, 1.5)
    smudge = np.clip(blur(1 - hand.tone, 2) * (0.8 + 0.25 * strokes(random, 6)), 0, 1) * 0.75
    black = np.clip(blur(hand.lines, 1.0) * 1.9, 0, 1) * np.clip(0.85 + 0.3 * noise(random, 0.7, 0.7), 0, 1)
    paper = 0.62 + 0.045 * noise(random, 0.7, 0.7)
    return ramp(paper * (1 - np.maximum(smudge, black)), (0.04, 0.04, 0.04), (1.0, 1.0, 1.0))


def _cross_stitch(subject: Subject, random: np.random.Generator) -> Field:
    cloth = tint(0.9, 0.87, 0.78)
    cover = blocks(subject.cover, 4) > 0.4
    threads = doubled(np.where(cover[..., None], levels(blocks(subject.on(WHITE), 4), 6), cloth), 4)
    down, across = ROWS % 8, COLUMNS % 8
    crossed = (np.abs(down - across) < 1.5) | (np.abs(down + across - 7) < 1.5)
    holes = (np.hypot((ROWS + 4) % 8 - 3.5, (COLUMNS + 4) % 8 - 3.5) < 1.5) * 0.2
    return threads * np.where(doubled(cover.astype(np.float32), 4), np.where(crossed, 1.05, 0.6), 1 - holes)[..., None]


def _chalkboard(subject: Subject, random: np.random.Generator) -> Field:
    hand = wavering(subject, random, 1.2)
    dust = np.clip(0.75 + 0.35 * noise(random, 0.6, 0.6), 0, 1)
    chalk = mix(hand.colours, WHITE, np.full((SIZE, SIZE), 0.4))
    board = tint(0.12, 0.27, 0.2) * (1 + 0.12 * noise(random, 3, 9))[..., None]
    filled = mix(board, chalk, hand.cover * 0.4 * np.clip(0.7 + strokes(random, 5) * 0.5, 0, 1))
    return mix(filled, chalk, np.clip(hand.lines * 1.5, 0, 1) * dust)


def _cyanotype(subject: Subject, random: np.random.Generator) -> Field:
    away = np.minimum.reduce([ROWS, COLUMNS, SIZE - 1 - ROWS, SIZE - 1 - COLUMNS])
    brushed = np.clip((away - 3 + 1.5 * noise(random, 2, 2)) / 2, 0, 1)
    light = mix(0.1 + 0.04 * noise(random, 3, 3), 0.3 + 0.65 * subject.tone, subject.cover)
    print_ = ramp(light, (0.02, 0.12, 0.3), (0.15, 0.42, 0.62), (0.92, 0.96, 0.94))
    return mix((0.95, 0.94, 0.88), print_, brushed)


def _thermal_camera(subject: Subject, random: np.random.Generator) -> Field:
    warmth = blur(subject.cover, 2.5) * (0.45 + 0.5 * blur(subject.tone, 0.8)) * subject.cover
    heat = np.maximum(warmth, 0.4 * blur(subject.cover, 4))
    return ramp(heat, (0.05, 0.0, 0.25), (0.35, 0.0, 0.6), (0.9, 0.1, 0.35), (1.0, 0.6, 0.0), (1.0, 0.95, 0.5))


def _night_vision(subject: Subject, random: np.random.Generator) -> Field:
    light = mix(0.2, 0.45 + 0.6 * subject.tone, subject.cover) * vignette(0.6)
    seen = light * np.where(ROWS % 8 < 4, 1.0, 0.72) + 0.05 * noise(random, 0.6, 0.6)
    return ramp(seen, (0.0, 0.06, 0.0), (0.1, 0.6, 0.1), (0.75, 1.0, 0.65))


def _gold_emboss(subject: Subject, random: np.random.Generator) -> Field:
    height = blur(subject.cover * (0.6 + 0.9 * subject.tone), 1.0)
    down, across = np.gradient(height)
    shine = 0.36 + 0.22 * subject.cover - 1.5 * (down + across) + 0.04 * noise(random, 0.7, 4)
    return ramp(shine, (0.2, 0.09, 0.0), (0.72, 0.48, 0.08), (0.95, 0.78, 0.3), (1.0, 0.98, 0.75))


def _ink_stamp(subject: Subject, random: np.random.Generator) -> Field:
    subject = subject.within(48)
    dark = np.clip((0.55 - subject.tone) * 6, 0, 1) * subject.cover
    ink = np.maximum.reduce([dark, np.clip(subject.lines * 1.6, 0, 1), frame(2, 3)])
    worn = np.clip(1.15 + 0.5 * noise(random, 1.2, 1.2), 0, 1)
    return mix((0.98, 0.96, 0.93), (0.78, 0.05, 0.08), ink * worn)


def _woodcut(subject: Subject, random: np.random.Generator) -> Field:
    grain = ROWS + 1.2 * noise(random, 6, 10)
    ridges = 0.5 + 0.5 * np.cos(grain * np.pi / 3)
    tone = mix(0.93, 0.1 + 0.75 * subject.tone, subject.cover)
    ink = np.clip((ridges - tone) * 6 + 0.5, 0, 1)
    return mix((0.9, 0.72, 0.47), (0.13, 0.06, 0.03), np.maximum(ink, np.clip(subject.lines * 1.6, 0, 1)))


def _comic(subject: Subject, random: np.random.Generator) -> Field:
    flat = levels(saturated(smoothed(subject.colours, 2), 1.6), 4)
    ring = ndimage.maximum_filter(subject.cover, 5) - ndimage.minimum_filter(subject.cover, 3)
    ink = np.maximum(np.clip(ring * 1.2, 0, 1), np.clip(subject.lines * 1.5 - 0.3, 0, 1))
    return mix(mix(WHITE, flat, subject.cover), BLACK, ink)


def _crayon(subject: Subject, random: np.random.Generator) -> Field:
    hand = wavering(subject, random, 1.4)
    wax = np.clip(0.75 + 0.55 * strokes(random, 5), 0.1, 1)
    drawn = mix((0.99, 0.98, 0.95), saturated(hand.colours, 1.4), hand.cover * wax)
    return mix(drawn, saturated(hand.colours, 1.4) * 0.5, np.clip(hand.lines * 1.2, 0, 1) * np.clip(wax + 0.2, 0, 1))


def _x_ray(subject: Subject, random: np.random.Generator) -> Field:
    bones = subject.cover * (0.2 + 0.45 * (1 - subject.tone)) + 0.4 * blur(subject.lines, 1.0)
    return ramp(blur(bones, 0.8) + 0.01 * noise(random, 1, 1), (0.0, 0.02, 0.05), (0.35, 0.55, 0.65), (0.9, 1.0, 1.0))


def _pastel(subject: Subject, random: np.random.Generator) -> Field:
    ground = ramp((ROWS + COLUMNS) / (2 * SIZE), (1.0, 0.84, 0.9), (0.86, 0.84, 1.0))
    soft = mix(saturated(subject.colours, 0.8), WHITE, np.full((SIZE, SIZE), 0.5))
    return blur(mix(ground, soft, subject.cover), 1.0) + 0.012 * noise(random, 0.7, 0.7)[..., None]


def _glitch(subject: Subject, random: np.random.Generator) -> Field:
    picture = subject.on((0.05, 0.05, 0.08))
    bands = np.repeat(random.integers(-6, 7, SIZE // 8), 8) * np.repeat(random.random(SIZE // 8) < 0.5, 8)
    across = COLUMNS.astype(int) + bands[:, None]
    rows = ROWS.astype(int)
    split = [picture[rows, (across + move) % SIZE, channel] for channel, move in enumerate((-5, 0, 5))]
    return np.stack(split, axis=2) * np.where(ROWS % 4 < 2, 1.0, 0.75)[..., None]


def _game_boy(subject: Subject, random: np.random.Generator) -> Field:
    tone = mix(1.0, 0.67 * blocks(subject.tone, 4), blocks(subject.cover, 4) > 0.3)
    greens: tuple[Colour, ...] = ((0.04, 0.16, 0.06), (0.19, 0.38, 0.19), (0.5, 0.64, 0.1), (0.76, 0.85, 0.4))
    return doubled(ramp(levels(tone, 4), *greens))


def _sticker(subject: Subject, random: np.random.Generator) -> Field:
    subject = subject.within(54)
    border = np.clip(blur(ndimage.maximum_filter(subject.cover, 7), 0.7), 0, 1)
    shadow = ndimage.shift(blur(border, 1.5), (3, 3), order=0) * 0.5
    return mix(mix(mix((0.35, 0.55, 0.6), BLACK, shadow), WHITE, border), subject.colours, subject.cover)


def _vaporwave(subject: Subject, random: np.random.Generator) -> Field:
    sunset = ramp(ROWS / SIZE, (0.2, 0.05, 0.45), (0.95, 0.3, 0.65), (1.0, 0.7, 0.45))
    return mix(sunset, ramp(subject.tone, (0.3, 0.0, 0.6), (0.1, 0.6, 0.95), (0.75, 1.0, 0.95)), subject.cover)


def _style(name: str, trigger: str, paint: Painter, description: str) -> Style:
    return Style(name, description, trigger, partial(_apply, paint, name))


STYLES: tuple[Style, ...] = (
    _style("watercolor", "watercolor painting", _watercolor, "Wet, pale colours that pool and run on rough paper."),
    _style("pencil sketch", "pencil sketch", _pencil_sketch, "Thin graphite lines and hatching on white paper."),
    _style(
        "pixel art", "pixel art sprite", _pixel_art, "A video game sprite of few, large pixels on a light blue sky."
    ),
    _style("blueprint", "technical blueprint", _blueprint, "White lines of a technical drawing on gridded blue paper."),
    _style("neon", "glowing neon sign", _neon, "Contours as glowing neon tubes in the dark."),
    _style("sepia", "old sepia photograph", _sepia, "A brown photograph of long ago that darkens to its corners."),
    _style("oil painting", "oil painting", _oil_painting, "Thick dabs of saturated oil paint on a brown canvas."),
    _style("stained glass", "stained glass window", _stained_glass, "Pieces of bright glass between dark lead."),
    _style("mosaic", "tile mosaic", _mosaic, "Small square stone tiles with pale joints."),
    _style("halftone", "newspaper halftone", _halftone, "Black printing dots on newspaper."),
    _style("pop art", "pop art print", _pop_art, "A screen print in four loud inks on a flat bright ground."),
    _style("charcoal", "charcoal drawing", _charcoal, "Broad, smudged black strokes on grey paper."),
    _style(
        "cross stitch", "cross stitch embroidery", _cross_stitch, "Embroidered crosses of coloured thread on linen."
    ),
    _style("chalkboard", "chalk drawing", _chalkboard, "Coloured chalk on a green board."),
    _style("cyanotype", "cyanotype print", _cyanotype, "A Prussian blue sun print with brushed edges."),
    _style("thermal camera", "thermal image", _thermal_camera, "Heat in false colours, from violet to yellow."),
    _style("night vision", "night vision goggles", _night_vision, "Green light, dark corners and scan lines."),
    _style("gold emboss", "embossed gold", _gold_emboss, "A relief struck into a plate of gold."),
    _style("ink stamp", "red ink stamp", _ink_stamp, "A worn red stamp with a square frame."),
    _style("woodcut", "woodcut print", _woodcut, "Carved lines printed in dark brown on tan paper."),
    _style("comic", "comic book", _comic, "Flat colours inside thick black outlines."),
    _style("crayon", "crayon drawing", _crayon, "A child's waxy strokes that leave gaps of paper."),
    _style("x-ray", "x-ray image", _x_ray, "Pale, transparent shapes on black film."),
    _style("pastel", "soft pastel", _pastel, "Milky colours on pink and lilac."),
    _style("glitch", "glitch art", _glitch, "A broken screen: torn bands and colours that part."),
    _style("game boy", "game boy screen", _game_boy, "Four greens of an old handheld game."),
    _style("sticker", "die-cut sticker", _sticker, "A white rim and a shadow on a teal wall."),
    _style("vaporwave", "vaporwave aesthetic", _vaporwave, "Turquoise light before a pink and violet sunset."),
)
